"""Models fetched from the hub as files."""

from __future__ import annotations

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

_HUB_FILES = ("*.safetensors", "*.json", *TOKENIZER_FILES)


def download(name: str) -> Path:
    """The folder of a model that the hub gives. Raises ``ConfigError``."""
    hub = import_optional("huggingface_hub", 'pip install "ciphertune[hf]"')
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        # The hub's client raises errors of several libraries.
        raise ConfigError(f"{name!r} is neither a folder nor a model that the hub gives: {error}") from error
