"""The files of a bundle beside its tensors, and reading them with distrust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ciphertune._support.bundle_names import CLIENT_MANIFEST, WORKER_MANIFEST, part_of_bundle
from ciphertune.errors import ConfigError

CLIENT_FORMAT = "ciphertune-client-1"
WORKER_FORMAT = "ciphertune-worker-1"
OUTSOURCED = "outsourced.safetensors"
_LARGEST_MANIFEST = 1 << 28


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest_file(file: Path, form: str) -> dict[str, Any]:
    """A manifest of this format. Raises ``ConfigError``."""
    try:
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise ConfigError(f"{file} is too large to be a manifest")
        if not file.is_file():
            raise ConfigError(f"{file.parent} is not a bundle's folder: it has no file {file.name}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        _refuse_other_part(file)
        raise ConfigError(
            f"{file.parent} is not a bundle's folder: cannot read {file.name}: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: it is not JSON") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != form:
        raise ConfigError(f"{file} has format {found!r}, expected {form!r}: split the model again with this version")
    return dict(content)


def _refuse_other_part(file: Path) -> None:
    """Raise ``ConfigError`` for a folder that is another part of a bundle than the one asked for, or a whole one."""
    wanted, folder = {CLIENT_MANIFEST: "client", WORKER_MANIFEST: "worker"}[file.name], file.parent
    found = part_of_bundle(folder)
    if found == "whole":
        parts = sorted(path.name for path in folder.glob(f"{wanted}*") if path.is_dir())
        raise ConfigError(f"{folder} is a whole bundle: name {' or '.join(str(folder / part) for part in parts[:4])}")
    if found not in (None, wanted):
        owner = {"client": "the client's", "worker": "a worker's"}
        raise ConfigError(f"{folder} is {owner[str(found)]} part of a bundle, and {owner[wanted]} is needed here")
    if (folder / "config.json").is_file() and not (folder / OUTSOURCED).exists():
        raise ConfigError(f"{folder} is a model and no part of a bundle: split it first with 'ciphertune split'")


def floating(dtype: str) -> torch.dtype:
    """A floating-point dtype by its name. Raises ``ConfigError``."""
    found = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in found:
        raise ConfigError(f"the manifest names an unknown dtype {dtype!r}")
    return found[dtype]
