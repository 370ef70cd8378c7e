"""Compatibility with older releases of torch and with its compiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.lr_scheduler import LRScheduler

_NOTHING = contextlib.nullcontext()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Wrap a function so that ``torch.compile`` calls it without compiling it.

    The work of a session (keys, randomness, requests, counts) cannot be traced once and repeated. The compiler is
    imported at the first call, since the import takes a second.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        # Where nothing is compiled, the function itself: what keeps the compiler out costs as much as a small product.
        if not torch.compiler.is_compiling() and _nothing_compiles():
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return called  # type: ignore[return-value]


def _nothing_compiles() -> bool:
    """Whether the calling thread is in no compiled code, by which what is called from there would be compiled too."""
    found = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return found is not None and found() is None


def transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one that a transform of ``torch.func`` (``grad``, ``vmap``, ``jvp`` …) computes with."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def in_forward_ad() -> bool:
    """Whether tensors may carry tangents, within ``torch.autograd.forward_ad.dual_level``."""
    return bool(forward_ad._current_level >= 0)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on this type of device; one that does nothing, which costs less, where it is off."""
    return _NOTHING if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def batched_by_autograd(*tensors: Tensor | None) -> bool:
    """Whether autograd computes with tensors of several examples at once: ``is_grads_batched``, a vectorized jacobian.

    It has a ``vmap`` of its own for this, which asks no rule of an ``autograd.Function``. torch 2.3 does not tell.
    """
    batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return batched is not None and any(tensor is not None and batched(tensor) for tensor in tensors)


def rows_of_all(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Call a function with the rows of all examples of such a batch, one example after the other.

    Args:
        function: of tensors (rows, …); gives one or a tuple of them, with as many rows.
        tensors: what it is called with, some of them batched; None is handed on.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    first = next(each for each in tensors if batched_by_autograd(each))
    assert first is not None
    batch = len(torch._remove_batch_dim(first, level, 1, 0))

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch._remove_batch_dim(tensor, level, batch, 0).flatten(0, 1)

    def batched(rows: Tensor) -> Tensor:
        return torch._add_batch_dim(rows.reshape(batch, -1, *rows.shape[1:]), 0, level)

    rows = [flat(tensor) for tensor in tensors]
    with _outside_of_batches():
        result = function(*rows)
    return tuple(map(batched, result)) if isinstance(result, tuple) else batched(result)


@contextlib.contextmanager
def _outside_of_batches() -> Iterator[None]:
    """Randomness is refused within a batch."""
    torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        torch._C._vmapmode_increment_nesting()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this type of device; None where autocast is off."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # torch 2.3 has one function for each of these two types of device.
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    if kind == "cuda":
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return None


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """The scheduler's state dict. In torch 2.3, that of ``OneCycleLR`` also holds a function, which is left out."""
    return {name: value for name, value in scheduler.state_dict().items() if name != "anneal_func"}
