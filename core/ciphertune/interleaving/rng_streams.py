"""A stream of torch's random numbers for each of several interleaved tasks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from types import TracebackType

import torch
from torch import Tensor

from ciphertune._support.torch_rng import capture_states, restore_states

_State = tuple[Tensor, ...]
"""States of torch's generator on the CPU, then of those on the GPUs that are in use."""


class RandomStreams:
    """Random streams of interleaved tasks: what one task draws, or draws again, does not change another's numbers.

    Gradient checkpointing draws again: it sets the generators back to recompute a forward pass. The first stream is
    the process's own; the others are seeded from its state. At the end the process continues the stream of the last
    task that drew, or its own where none did. The generators of Python and NumPy are shared by all tasks.

    Args:
        count: streams, 1 or more.
    """

    def __init__(self, count: int) -> None:
        start = capture_states()
        self._starts = [start, *(_derived(start, number) for number in range(1, count))]
        self._states = list(self._starts)

    def __enter__(self) -> RandomStreams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        drew = [now for now, start in zip(self._states, self._starts, strict=True) if not _same(now, start)]
        restore_states(drew[-1] if drew else self._starts[0])

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Use the stream of one task within a ``with`` block."""
        restore_states(self._states[number])
        try:
            yield
        finally:
            self._states[number] = capture_states()


def _derived(state: _State, number: int) -> _State:
    """The state of generators with a seed of their own for this number and state, by SHA-256."""
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in state) + number.to_bytes(8, "big")).digest()
    seed = int.from_bytes(digest[:7], "big")
    devices = ["cpu", *(f"cuda:{index}" for index in range(len(state) - 1))]
    return tuple(torch.Generator(device).manual_seed(seed).get_state() for device in devices)


def _same(left: _State, right: _State) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))
