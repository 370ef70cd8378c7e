"""Products modulo 2^32 are exact, whatever the values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ciphertune_slalom import arithmetic
from ciphertune_slalom.arithmetic import product, wide_product


def random_words(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(1 << 31), 1 << 31, (rows, columns), generator=generator, dtype=torch.int64)
    values[0, ::3] = -(1 << 31)
    values[-1, ::2] = (1 << 31) - 1
    return values.to(torch.int32)


def codes(rows: int, columns: int) -> Tensor:
    found = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    found[0] = -128
    return found


def exact(values: Tensor, weights: Tensor) -> list[list[int]]:
    rows = [[sum(a * b for a, b in zip(x, w, strict=True)) for w in weights.tolist()] for x in values.tolist()]
    return [[(each + (1 << 31)) % (1 << 32) - (1 << 31) for each in row] for row in rows]


@pytest.mark.parametrize(("tokens", "features", "outputs"), [(1, 1, 1), (3, 17, 5), (2, 40_000, 3), (70, 33, 40)])
def test_products_are_exact(tokens: int, features: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, weight = random_words(tokens, features), codes(outputs, features)
    assert product(values, weight).tolist() == exact(values, weight)
    monkeypatch.setattr(arithmetic, "_HELD", 64)  # parts of tokens and of outputs
    assert product(values, weight.t().contiguous().t()).tolist() == exact(values, weight)


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (19, 300), (2, 40_000)])
def test_products_of_wide_numbers_are_exact(tokens: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = random_words(tokens, features), random_words(3, features, seed=2)
    assert wide_product(values, weights).tolist() == exact(values, weights)
    monkeypatch.setattr(arithmetic, "_HELD", 64)
    assert wide_product(values, weights).tolist() == exact(values, weights)
