"""Compatibility with older releases of torch and with its compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Wrap a function so that ``torch.compile`` calls it without compiling it.

    The work of a session (keys, randomness, requests, counts) cannot be traced once and repeated. The compiler is
    imported at the first call, since the import takes a second.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return called  # type: ignore[return-value]


def transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one that a transform of ``torch.func`` (``grad``, ``vmap``, ``jvp`` …) computes with."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


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
