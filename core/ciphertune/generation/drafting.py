"""A small model at the client that guesses tokens, which the outsourced model checks."""

from __future__ import annotations

from typing import Any

from ciphertune.errors import ConfigError
from ciphertune.generation.opening import OpenedModel
from ciphertune.models.load import load_named_model


def load_draft(opened: OpenedModel, name: str) -> Any:
    """Load a draft model in the clear. It stays on this machine.

    Args:
        opened: the model that checks its guesses.
        name: the built-in ``smollm2``, or a folder or hub name for transformers.

    Raises:
        ConfigError: it cannot be loaded, or its tokens are others.
    """
    model, tokenizer = load_named_model(name)
    if tokenizer.get_vocab() != opened.tokenizer.get_vocab():
        raise ConfigError(
            f"the draft {name!r} has other tokens than {opened.source.name!r}: take a smaller model of the same family"
        )
    return model.eval()
