"""The files of a bundle, and reading them with distrust."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciphertune._support.bundle_names import CLIENT_MANIFEST, WORKER_MANIFEST, part_of_bundle
from ciphertune.errors import ConfigError

CLIENT_FORMAT = "ciphertune-client-1"
WORKER_FORMAT = "ciphertune-worker-1"
OUTSOURCED = "outsourced.safetensors"
INDEX = "model.safetensors.index.json"
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


def inside(folder: Path, name: Any) -> Path:
    """A file that a manifest names, which must lie in its folder. Raises ``ConfigError``."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"the manifest in {folder} names a file outside it")
    return folder / name


def open_tensors(file: Path) -> Any:
    """A safetensors file, memory-mapped: tensors are views of its pages until they are moved or changed.

    Raises:
        ConfigError: missing or damaged.
    """
    import safetensors

    try:
        return safetensors.safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing from the bundle") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


def read_tensor(handle: Any, file: Path, name: str) -> Tensor:
    """Read one tensor of an open file. Raises ``ConfigError``."""
    import safetensors

    try:
        tensor: Tensor = handle.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: it holds no tensor {name!r}") from error
    return tensor


def tensor_shape(handle: Any, file: Path, name: str) -> tuple[int, ...]:
    """The shape that an open file says a tensor has. Raises ``ConfigError``."""
    import safetensors

    try:
        return tuple(handle.get_slice(name).get_shape())
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: it holds no tensor {name!r}") from error


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, for a folder with safetensors, sharded or not; empty where there is none.

    Raises:
        ConfigError: the index or a file is damaged.
    """
    index = folder / INDEX
    if index.exists():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): inside(folder, file) for name, file in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged") from error
    single = folder / "model.safetensors"
    if not single.exists():
        return {}
    return dict.fromkeys(open_tensors(single).keys(), single)


class TensorFiles:
    """Tensors by name from the files of a folder, one file open at a time."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: tuple[Path, Any] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        """A memory-mapped tensor. Raises ``ConfigError``."""
        file = self._files[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, open_tensors(file))
        return read_tensor(self._open[1], file, name)


def floating(dtype: str) -> torch.dtype:
    """A floating-point dtype by its name. Raises ``ConfigError``."""
    found = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in found:
        raise ConfigError(f"the manifest names an unknown dtype {dtype!r}")
    return found[dtype]
