"""The process's random states: Python, NumPy, torch, and CUDA where it is in use."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from ciphertune._support.torch_rng import capture_states, restore_states


def capture() -> dict[str, Any]:
    """Copy the random states as tensors and plain values."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    cpu, *gpus = capture_states()
    state = {"python": random.getstate(), "numpy": (kind, tuple(keys.tolist()), *rest), "torch": cpu}
    return {**state, "cuda": gpus} if gpus else state


def restore(state: dict[str, Any]) -> None:
    """Set the random states to those that ``capture`` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    restore_states((state["torch"], *state.get("cuda", ())))


def check(state: Any) -> None:
    """Check a state that was read from a file by setting generators that nothing else uses.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is no random state.
    """
    random.Random().setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.Generator().set_state(state["torch"])
    for cuda in state.get("cuda", ()):
        if not isinstance(cuda, torch.Tensor) or cuda.dtype != torch.uint8:
            raise TypeError("a CUDA random state must be a tensor of bytes")


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore the random states at the end of a ``with`` block, so that evaluating a run does not change it."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
