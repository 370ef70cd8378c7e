"""Numbers that pages state in words are those that the command they name gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ciphertune.planning.shares import shares_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "stated"),
    [
        ("README.md", {"llama-3-8b": "{:.0f}% of Llama-3-8B by default"}),
        ("docs/faq.md", {"llama-3-8b": "{:.0f}% of Llama-3-8B", "llama-3-70b": "and {:.0f}% of 70B by default"}),
    ],
)
def test_shares_in_words(page: str, stated: dict[str, str]) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    for model, words in stated.items():
        shares = shares_of(model)
        assert words.format(100 * shares.default) in text
        # With output head and token embedding.
        assert "more than 99.9%" in text
        assert shares.with_embeddings is not None
        assert math.floor(1000 * shares.with_embeddings) == 999
