"""Models fetched from the hub as files."""

from __future__ import annotations

import shutil
from pathlib import Path

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError

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


def download(name: str) -> Path:
    """The folder of a model that the hub gives. Raises ``ConfigError``."""
    hub = import_optional("huggingface_hub", 'pip install "ciphertune[hf]"')
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
