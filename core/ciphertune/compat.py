"""What older releases of torch call by other names. Everything here can go once torch 2.4 is the oldest supported."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


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
