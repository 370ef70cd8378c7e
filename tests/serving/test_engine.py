"""The thread that computes a server's answers."""

from __future__ import annotations

import queue
from typing import Any

import torch

from ciphertune._support.denormals import flushes
from ciphertune.serving.engine import Engine


class Seeing:
    """Notes in which state it computes."""

    open = mixes = True

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.seen: queue.Queue[bool] = queue.Queue()

    def join(self, answers: list[Any]) -> None:
        self.seen.put(flushes())

    def step(self) -> None:
        """There is nothing to do."""

    def clear(self) -> None:
        """Nor to forget."""


class Asked:
    caller, cancelled = "one", False


def test_denormals_are_zeros_on_the_thread_that_computes() -> None:
    before, decoder = flushes(), Seeing()
    torch.set_flush_denormal(False)
    try:
        engine = Engine(decoder, most=2, waiting=2)  # type: ignore[arg-type]
        engine.submit([Asked()])  # type: ignore[list-item]
        assert decoder.seen.get(timeout=60)
        engine.close()
        assert not flushes()
    finally:
        torch.set_flush_denormal(before)
