"""What a measurement compares with, and what it was made with: bfloat16 where the machine has it, and the kernel."""

from __future__ import annotations

from pathlib import Path

import torch

from ciphertune.backend import Backend


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by instructions of its own.

    Elsewhere torch converts, and a comparison would say something of that. False where the system does not tell.
    """
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = {flag for line in told.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def kernel_of(backend: Backend) -> str | None:
    """What a backend's worker half multiplies with on this machine's processor; None where it has no name."""
    told = backend.diagnose(torch.device("cpu")).get("kernel")
    return None if told is None else str(told)
