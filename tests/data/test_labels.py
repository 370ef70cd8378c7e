"""Texts with labels: names, numbers, and held-out parts."""

from __future__ import annotations

from typing import Any

import pytest

from ciphertune.data.labels import LabelCollator, LabelledTokens, label_names, labelled, tokens_of
from ciphertune.data.rows import Row
from ciphertune.data.splitting import split_by
from ciphertune.errors import ConfigError


def rows(*labels: Any) -> list[Row]:
    return [Row(f"line {number} of a.csv", {"text": "SECRET", "label": label}) for number, label in enumerate(labels)]


def names(*labels: Any, given: tuple[str, ...] | None = None) -> tuple[str, ...]:
    return label_names(labelled(rows(*labels), None, "label"), given)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (("no", "yes", " no "), ("no", "yes")),
        ((10, 9, 2), ("2", "9", "10")),
        (("10", "9", "-1"), ("-1", "9", "10")),
        ((1.0, 0.0), ("0", "1")),
        ((True, False), ("false", "true")),
        (("7", "007"), ("007", "7")),
        (("--1", "1"), ("--1", "1")),
    ],
)
def test_names(labels: tuple[Any, ...], wanted: tuple[str, ...]) -> None:
    assert names(*labels) == wanted


def test_names_that_are_given_keep_their_order() -> None:
    assert names("a", "b", given=("b", "c", "a")) == ("b", "c", "a")
    with pytest.raises(ConfigError, match=r"line 1 of a\.csv: its label is none of data\.labels, which are b, c"):
        names("b", "a", given=("b", "c"))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((0.5, 1.0), "line 0 of a.csv: the label in 'label' is no text and no whole number"),
        (("a", ""), "line 1 of a.csv: the label in 'label' is empty"),
        (("a", None), "is empty"),
        (("a", ["a"]), "is no text"),
        (("a", "a"), "there are 1 different labels in 2 rows"),
        (tuple(range(1001)), "there are 1001 different labels"),
    ],
)
def test_labels_that_are_none(labels: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        names(*labels)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text_field", "label_field", "said"),
    [
        (None, "class", "no field 'class', but the fields 'text', 'label': set data.label_field"),
        ("body", "label", "the field 'body' is missing; .*: set data.text_field"),
    ],
)
def test_columns_that_are_missing(text_field: str | None, label_field: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        labelled(rows("a", "b"), text_field, label_field)
    assert "SECRET" not in str(caught.value)


def test_a_blank_text_with_a_label() -> None:
    with pytest.raises(ConfigError, match="line 3 of a: the text in 'text' is blank"):
        labelled([Row("line 3 of a", {"text": " ", "label": "a"})], None, "label")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9])
def test_of_every_label_the_same_share_is_held_out(share: float) -> None:
    """Also where the rows are in order of their labels, as exports are."""
    kinds = ["a"] * 40 + ["b"] * 20 + ["c"] * 3 + ["d"]
    train, held = split_by(list(range(len(kinds))), kinds, share)
    assert sorted([*train, *held]) == list(range(len(kinds)))
    for kind in "abcd":
        count = kinds.count(kind)
        kept = sum(kinds[place] == kind for place in held)
        assert kept == min(round(share * count), count - 1)


class Words:
    def __call__(self, text: str, truncation: bool = False, max_length: int = 0, verbose: bool = True) -> Any:
        ids = [1, *map(len, text.split()), 2]
        return {"input_ids": [*ids[: max_length - 1], 2] if truncation and len(ids) > max_length else ids}


def test_texts_are_cut_with_their_special_tokens_kept() -> None:
    examples = labelled([Row("a", {"text": "one two three", "label": "b"})] * 2, None, "label")
    found, cut = tokens_of(examples, ("a", "b"), Words(), 4)
    assert found[0] == LabelledTokens([1, 3, 3, 2], 1)
    assert (cut.examples, cut.shortened, cut.longest) == (2, 2, 5)
    batch = LabelCollator(0)([found[0], LabelledTokens([1, 2], 0)])
    assert batch["input_ids"].tolist() == [[1, 3, 3, 2], [1, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
