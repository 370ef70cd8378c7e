"""Texts cut into rows of tokens, and batches of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def language_reference() -> dict[str, str]:
    """The articles of the Python language reference, as Python ships them for ``help()``."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def rows_of(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Join texts and cut them into rows of ``length`` tokens; the rest that fills no row is left out.

    Returns:
        (rows, length) int64.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        # Long texts are cut before tokenizing, since a tokenizer warns about more than its model's context.
        found: list[int] = tokenizer(text, verbose=False)["input_ids"]
        # Some tokenizers add the end themselves.
        ids += found if end is None or found[-1:] == [end] else [*found, end]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches_of(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Make batches for causal language modelling, whose labels are the inputs."""
    return [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in torch.split(rows, size)
    ]


def split_texts(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Texts for training and a held-out part, evenly spread over them.

    Args:
        texts: two or more.
        share: of the texts to hold out, above 0 and below 1; at least one is held out and one is not.

    >>> split_texts("abcdefgh", 0.4)
    (['b', 'd', 'e', 'g', 'h'], ['a', 'c', 'f'])
    """
    count = min(max(1, round(len(texts) * share)), len(texts) - 1)
    held = {number * len(texts) // count for number in range(count)}
    return [text for i, text in enumerate(texts) if i not in held], [texts[i] for i in sorted(held)]
