"""Sequences of at most so many tokens, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.data.render import IGNORED, Tokens


@dataclasses.dataclass
class Cut:
    """What was done to examples to make them fit.

    Attributes:
        examples: there were.
        shortened: lost tokens at their end.
        longest: tokens of the longest, before.
        empty: left out, because no token that is learned was left.
        left_over: tokens that filled no last sequence, where examples are joined.
    """

    examples: int = 0
    shortened: int = 0
    longest: int = 0
    empty: int = 0
    left_over: int = 0

    def told(self, length: int) -> str:
        """The counts as a sentence, empty where nothing was lost."""
        parts = []
        if self.shortened:
            parts.append(
                f"{self.shortened} of {self.examples} examples are longer than {length} tokens (the longest has "
                f"{self.longest}) and were cut"
            )
        if self.empty:
            parts.append(f"{self.empty} left out, since nothing of them is learned within {length} tokens")
        if self.left_over:
            parts.append(f"{self.left_over} tokens at the end fill no sequence and were left out")
        return "; ".join(parts)


def joined(examples: Sequence[Tokens], length: int) -> tuple[list[Tokens], Cut]:
    """Join examples and cut them into sequences of ``length`` tokens; the rest that fills none is left out."""
    ids = [token for example in examples for token in example.ids]
    labels = [label for example in examples for label in example.labels]
    longest = max((len(example.ids) for example in examples), default=0)
    whole = len(ids) // length * length
    rows = [Tokens(ids[at : at + length], labels[at : at + length]) for at in range(0, whole, length)]
    kept = [row for row in rows if _learned(row)]
    return kept, Cut(len(examples), longest=longest, empty=len(rows) - len(kept), left_over=len(ids) - whole)


def apart(examples: Sequence[Tokens], length: int) -> tuple[list[Tokens], Cut]:
    """One sequence for each example, of its first ``length`` tokens."""
    cut = Cut(len(examples))
    kept = []
    for example in examples:
        cut.longest = max(cut.longest, len(example.ids))
        cut.shortened += len(example.ids) > length
        row = Tokens(example.ids[:length], example.labels[:length])
        if _learned(row):
            kept.append(row)
        else:
            cut.empty += 1
    return kept, cut


def _learned(row: Tokens) -> bool:
    """Whether there is a label that a loss counts; of the first token none is, since nothing predicts it."""
    return any(label != IGNORED for label in row.labels[1:])


class Collator:
    """Makes a batch of sequences, padded at their end to the longest.

    Args:
        pad: token to pad with; it is not learned and not attended to.
        multiple: pad to a multiple of so many tokens; None for no more than the longest.
    """

    def __init__(self, pad: int, multiple: int | None = None) -> None:
        self.pad = pad
        self.multiple = multiple

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask``: (rows, tokens) int64 each."""
        ids, mask = padded([row.ids for row in rows], self.pad, self.multiple)
        labels, _ = padded([row.labels for row in rows], IGNORED, self.multiple)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def padded(rows: Sequence[Sequence[int]], pad: int, multiple: int | None = None) -> tuple[Tensor, Tensor]:
    """Numbers padded at their end, and 1 where there is one of them and 0 behind: (rows, length) int64 each."""
    multiple = multiple or 1
    width = -(-max(map(len, rows)) // multiple) * multiple
    numbers = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    return numbers, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def padding(tokenizer: Any) -> int:
    """The token to pad with: the tokenizer's own, else its end, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
