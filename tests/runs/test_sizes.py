"""Sizes of batches in runs, and what is said of them."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from ciphertune.runs import sizes
from ciphertune.runs.sizes import SmallBatches, evaluation_size, evaluations_told
from ciphertune.traffic import Exchange
from ciphertune.training.settings import TrainingSettings


def sequences(count: int, length: int) -> list[Any]:
    return [types.SimpleNamespace(ids=[0] * length) for _ in range(count)]


@pytest.mark.parametrize(
    ("gigabytes", "length", "size"), [(64.0, 256, 8), (0.4, 256, 2), (0.01, 256, 2), (64.0, 16, 128), (None, 16, 26)]
)
def test_evaluations_take_batches_as_large_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float | None, length: int, size: int
) -> None:
    monkeypatch.setattr(sizes, "memory", lambda: (gigabytes, gigabytes))
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(hidden_size=576, intermediate_size=1536)  # type: ignore[assignment]
    model.get_input_embeddings = lambda: torch.nn.Embedding(2**15 - 2400, 1)  # type: ignore[assignment]
    assert evaluation_size(sequences(3, length), model, 2) == size


def test_what_evaluations_take_is_said_where_it_is_more_than_training() -> None:
    training = TrainingSettings(steps=100, eval_every=10, eval_on_start=True)
    assert evaluations_told(training, 10_000, 60, 4) is None
    told = evaluations_told(training, 10_000, 600, 4)
    assert told is not None
    assert told.startswith("11 evaluations of 600 sequences will take about 8.2 times as long")
    assert "now 10" in told
    assert "about 14 are" in told
    assert evaluations_told(TrainingSettings(), 90, 10, 4) is None


def timed(tokens: int, fixed: float, slope: float, direction: str = "forward") -> Exchange:
    exchange = Exchange(layers=("up",), direction=direction, tokens=tokens)  # type: ignore[arg-type]
    exchange.wait_seconds = fixed + slope * tokens
    return exchange


@pytest.mark.parametrize(
    ("fixed", "slope", "said"),
    [
        (0.080, 0.001, "Batches of 16 tokens are small: 83% of the time of products does not depend on their size. "
         "With data.batch_size = 10 a step takes about 2.5 times as long for 10 times the data"),
        (0.010, 0.001, None),
        (0.080, 0.0, None),
    ],
)  # fmt: skip
def test_small_batches_are_told_of_once(fixed: float, slope: float, said: str | None) -> None:
    lines: list[str] = []
    judge = SmallBatches(1, lines.append)
    judge.ciphertune_after_reply(timed(512, fixed, slope))
    for step in (1, 2, 3):
        judge.ciphertune_after_reply(timed(16, fixed, slope))
        judge.ciphertune_after_reply(timed(16, 9.0, 9.0, "backward"))
        judge.ciphertune_training_step(step)
    assert lines == ([said] if said else [])
