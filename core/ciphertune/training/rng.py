"""The process's random states: Python, NumPy, torch, and CUDA where it is in use."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """A copy of the random states, as tensors and plain values."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, tuple(keys.tolist()), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what ``capture`` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state.get("cuda", ())):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(cuda, device)


def check(state: Any) -> None:
    """Try a state that was read from a file on throw-away generators.

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
    """Leave the random states as they were, so that looking at a run does not change it."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
