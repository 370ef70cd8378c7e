"""Texts cut into rows of tokens, and batches of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        ids += tokenizer(text, verbose=False)["input_ids"] + ([] if end is None else [end])
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches_of(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Make batches for causal language modelling, whose labels are the inputs."""
    return [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in torch.split(rows, size)
    ]


def split_articles(articles: Mapping[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """Split articles into those for training and a held-out part, spread evenly over the alphabet."""
    every = max(2, round(1 / fraction))
    names = list(articles)
    held = set(names[::every])
    return [articles[n] for n in names if n not in held], [articles[n] for n in names if n in held]
