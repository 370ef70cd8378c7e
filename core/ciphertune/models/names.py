"""Names of models that are never sent to a hub."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from pathlib import Path

from ciphertune.errors import ConfigError

_FILES = (".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".gguf", ".safetensors", ".bin", ".pt", ".zip")


def refuse_path(name: str, built_in: Collection[str] = ("smollm2",)) -> None:
    """Raise ``ConfigError`` for a name that was meant for something on this machine, where there is no such folder.

    Names of folders can be private, so one that looks like a path, or like a built-in model, is not sent to a hub.

    Args:
        name: what the user gave.
        built_in: names that need no hub.

    >>> refuse_path("owner/name")
    """
    if Path(name).exists() or not name:
        return
    parts = name.replace(os.sep, "/").split("/")
    if name.lower().endswith(_FILES):
        reason = "what ends like a file is"
    elif len(parts) > 2 or parts[0] in ("", ".", "..", "~") or (len(parts) == 2 and Path(parts[0]).is_dir()):
        reason = "a path is"
    elif len(parts) == 1 and (meant := difflib.get_close_matches(name.lower(), built_in, n=1, cutoff=0.8)):
        reason = f"did you mean {meant[0]!r}? What is so close to a built-in name is"
    else:
        return
    raise ConfigError(f"cannot load the model {name!r}: there is no such folder; {reason} not looked for on a hub")
