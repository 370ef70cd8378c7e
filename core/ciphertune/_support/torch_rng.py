"""States of torch's random generators, on the CPU and on the GPUs that are in use."""

from __future__ import annotations

import torch
from torch import Tensor


def cuda_in_use() -> bool:
    """Whether CUDA is available and this process has initialised it."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def capture_states() -> tuple[Tensor, ...]:
    """Copy the state of the CPU's generator, then those of the GPUs, as bytes."""
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda_in_use() else ()))


def restore_states(states: tuple[Tensor, ...]) -> None:
    """Set the generators to states that ``capture_states`` returned; those of GPUs that are missing are ignored."""
    cpu, *gpus = states
    torch.set_rng_state(cpu)
    for device, state in enumerate(gpus):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)
