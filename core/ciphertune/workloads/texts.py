"""Texts cut into rows of tokens, and batches of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.data.render import text_ids
from ciphertune.errors import ConfigError

ROW = 256
"""Tokens of one sequence."""


def row_length(tokens: int) -> int:
    """Tokens of each row of a batch of so many: ``ROW`` at most. Raises ``ConfigError`` where they fill no rows."""
    length = min(ROW, tokens)
    if tokens < 2 or tokens % length:
        raise ConfigError(f"tokens must be below {ROW} or a multiple of it, not {tokens}")
    return length


def language_reference() -> dict[str, str]:
    """The articles of the Python language reference, as Python ships them for ``help()``."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def rows_of(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Join texts and cut them into rows of ``length`` tokens; the rest that fills no row is left out.

    Returns:
        (rows, length) int64.
    """
    ids = [token for text in texts for token in text_ids(text, tokenizer)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches_of(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Make batches for causal language modelling, whose labels are the inputs."""
    return [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in torch.split(rows, size)
    ]
