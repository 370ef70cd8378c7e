"""Models fetched from the hub as files."""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import threading
from pathlib import Path
from typing import Any

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError
from ciphertune.models.names import refuse_path

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
    "generation_config.json",
)
"""Patterns of a tokenizer's files, and of what stands beside them."""

_BESIDE = (
    *TOKENIZER_FILES,
    "*processor_config.json",
    "modules.json",
    "*sentence_*.json",
    "[0-9]*_*/*.json",
    "[0-9]*_*/*.safetensors",
    "scheduler_config.json",
)
"""Patterns of what belongs to a model beside its configuration and weights: a tokenizer, what reads images and sound,
and the modules that sentence-transformers puts behind it."""

_HUB_FILES = ("*.safetensors", "*.json", *_BESIDE)


_EXTRA = 'pip install "ciphertune[hf]"'
_SECONDS = 4.0
"""To wait for the hub at most. Its client tries again for half a minute."""


def found_at(name: str) -> str:
    """Where a model is: its folder, the copy that this machine keeps where the hub cannot be reached, or its name.

    The hub is tried once in a process, and without the name.

    Args:
        name: what the user gave.

    Raises:
        ConfigError: it was meant for something on this machine, the hub has no names of this form, or the model could
            only be there and the hub cannot be reached.
    """
    if Path(name).exists():
        return name
    refuse_path(name)
    hub = import_optional("huggingface_hub", _EXTRA)
    try:
        kept = hub.try_to_load_from_cache(name, "config.json")
    except ValueError:
        raise ConfigError(
            f"cannot load the model {name!r}: there is no such folder, and a hub has no names of this form "
            "(OWNER/NAME is expected)"
        ) from None
    if hub_answers():
        return name
    if not isinstance(kept, str):
        raise ConfigError(
            f"cannot load the model {name!r}: there is no such folder, no copy of it is on this machine, and the hub "
            "cannot be reached"
        )
    return str(Path(kept).parent)


@functools.cache
def hub_answers() -> bool:
    """Whether anything answers where the hub is; asked once in a process."""
    from huggingface_hub import constants

    utils: Any = importlib.import_module("huggingface_hub.utils")

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # of several libraries
            utils.get_session().head(constants.ENDPOINT, timeout=_SECONDS)
            answered.set()

    # The address is looked up first, to which no limit of time applies.
    asking = threading.Thread(target=ask, name="ciphertune-hub", daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return answered.is_set()


def download(name: str) -> Path:
    """The folder of a model that the hub gives. Raises ``ConfigError``."""
    hub = import_optional("huggingface_hub", _EXTRA)
    folder = Path(found_at(name))
    if folder.is_dir():
        return folder
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        # The hub's client raises errors of several libraries.
        raise ConfigError(f"{name!r} is neither a folder nor a model that the hub gives: {error}") from error


def copy_companions(folder: Path, target: Path) -> None:
    """Copy what belongs to a model beside its configuration and weights.

    Args:
        folder: of the model.
        target: a folder that exists.
    """
    for pattern in _BESIDE:
        for file in folder.glob(pattern):
            place = target / file.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
