"""What older releases of torch call by other names, and what keeps its compiler out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """A function that ``torch.compile`` calls and never looks into.

    What a session does (keys, randomness, requests, counts) is no computation on tensors that could be recorded once
    and repeated. The compiler is imported at the first call, not with ciphertune: it takes a second, and every
    optimizer of torch imports it anyway.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return called  # type: ignore[return-value]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this type of device, or None where it is off."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # torch 2.3 asks by a function per type of device, and knows these two.
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    if kind == "cuda":
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return None


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """The scheduler's state dict. In torch 2.3, that of ``OneCycleLR`` holds a function which it has anyway."""
    return {name: value for name, value in scheduler.state_dict().items() if name != "anneal_func"}
