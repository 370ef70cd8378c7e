"""Texts with labels, for classification."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.data.examples import text_in
from ciphertune.data.files import named
from ciphertune.data.rows import Row
from ciphertune.data.sequences import Cut, padded
from ciphertune.errors import ConfigError

_FEW = 8
"""Rows that are data enough to tell that no label comes back."""
_MOST = 1000
"""Labels that a classifier may have; more are numbers, names or texts rather than labels."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text and its label.

    Attributes:
        place: where it stands, for messages.
        text: the text.
        label: name of its label.
    """

    place: str
    text: str
    label: str


@dataclasses.dataclass(frozen=True)
class LabelledTokens:
    """The same as a model takes it.

    Attributes:
        ids: tokens of the text.
        label: number of its label.
    """

    ids: list[int]
    label: int


def labelled(rows: Sequence[Row], text_field: str | None, label_field: str) -> list[Labelled]:
    """The texts and labels of rows.

    Raises:
        ConfigError: a row lacks one of them. Nothing of it is quoted.
    """
    found = []
    for row in rows:
        if label_field not in row.fields:
            table = any(f"{suffix}" in row.place for suffix in (".csv", ".tsv"))
            head = ", and look whether the first line of the table names its columns" if table else ""
            raise ConfigError(
                f"{row.place} has no field {label_field!r}, but {named(row.fields)}: set data.label_field{head}"
            )
        text = text_in(row, text_field or "text", "text_field")
        if not text.strip():
            raise ConfigError(f"{row.place}: the text in {text_field or 'text'!r} is blank: leave the row out")
        found.append(Labelled(row.place, text, _label(row.fields[label_field], row, label_field)))
    return found


def _label(value: Any, row: Row, field: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # columns of whole numbers with gaps come as floats
    if isinstance(value, (int, str)) and str(value).strip():
        return str(value).strip()
    what = "is empty" if value is None or value == "" else "is no text and no whole number"
    raise ConfigError(f"{row.place}: the label in {field!r} {what}: each row needs one of a few labels")


def label_names(examples: Sequence[Labelled], given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of all labels, in the order of their numbers.

    Args:
        examples: all of them.
        given: the names, where they are said; else those that occur, numbers by their size and texts by the alphabet.

    Raises:
        ConfigError: there is one label alone, there are too many, or one that is not among those given.
    """
    found = {example.label for example in examples}
    if given is not None:
        for example in examples:
            if example.label not in given:
                raise ConfigError(f"{example.place}: its label is none of data.labels, which are {', '.join(given)}")
        names = tuple(given)
    else:
        numbers = all(name.removeprefix("-").isdecimal() for name in found)
        names = tuple(sorted(found, key=lambda name: (int(name), name)) if numbers else sorted(found))
    if len(names) < 2 or len(names) > _MOST or len(set(names)) < len(names):
        raise ConfigError(
            f"data.label_field: there are {len(names)} different labels in {len(examples)} rows, and a classifier has "
            f"2 to {_MOST}: set data.label_field to the column that holds them"
        )
    if given is None and len(names) == len(examples) >= _FEW:
        raise ConfigError(
            f"data.label_field: each of the {len(examples)} rows has a label of its own, so nothing could be learned "
            "of any: set data.label_field to a column with a few labels that come back"
        )
    return names


def tokens_of(
    examples: Sequence[Labelled], names: Sequence[str], tokenizer: Any, length: int
) -> tuple[list[LabelledTokens], Cut]:
    """Texts as their first ``length`` tokens, the tokenizer's special ones included, with the numbers of labels."""
    numbers = {name: number for number, name in enumerate(names)}
    cut, rows = Cut(len(examples)), []
    for example in examples:
        whole = len(tokenizer(example.text, verbose=False)["input_ids"])
        cut.longest = max(cut.longest, whole)
        cut.shortened += whole > length
        # A tokenizer that cuts keeps the tokens which it sets around a text.
        ids = tokenizer(example.text, truncation=True, max_length=length, verbose=False)["input_ids"]
        rows.append(LabelledTokens(list(ids), numbers[example.label]))
    return rows, cut


class LabelCollator:
    """Makes a batch of texts with labels, padded at their end to the longest; the arguments are ``Collator``'s."""

    def __init__(self, pad: int, multiple: int | None = None) -> None:
        self.pad = pad
        self.multiple = multiple

    def __call__(self, rows: Sequence[LabelledTokens]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, (rows, tokens), and ``labels``, (rows,), int64 each."""
        ids, mask = padded([row.ids for row in rows], self.pad, self.multiple)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row.label for row in rows])}
