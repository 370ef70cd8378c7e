"""Exact integer matrix products, chosen by trying them on this machine rather than by guess."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], None]
"""``kernel(w, x, out)``: w (N, K) int8 times x (K, C) int8 into out (N, C) int32, exact mod 2^32."""

MAX_DEPTH = 1 << 15
"""Products longer than this are cut: 2^15 · 128 · 255 stays inside int32 even with unsigned operands."""


def int8_product(w: Tensor, x: Tensor, out: Tensor) -> None:
    """The processor's own int8 product with int32 accumulation (VNNI, AMX, tensor cores)."""
    if w.device.type == "cuda":
        _cuda_product(w, x, out)
    else:
        torch._int_mm(w, x, out=out)


def float64_product(w: Tensor, x: Tensor, out: Tensor) -> None:
    """A portable product: every sum is an integer below 2^53, so float64 is exact."""
    out.copy_(torch.mm(w.to(torch.float64), x.to(torch.float64)))


def _cuda_product(w: Tensor, x: Tensor, out: Tensor) -> None:
    # cuBLASLt wants more than 16 rows and multiples of 8 elsewhere; zeros change no sum.
    rows, depth = w.shape
    columns = x.shape[1]
    pad_rows, pad_depth, pad_columns = max(0, 17 - rows), -depth % 8, -columns % 8
    w = torch.nn.functional.pad(w, (0, pad_depth, 0, pad_rows)).contiguous()
    x = torch.nn.functional.pad(x, (0, pad_columns, 0, pad_depth)).contiguous()
    out.copy_(torch._int_mm(w, x)[:rows, :columns])


KERNELS: dict[str, Kernel] = {"int8": int8_product, "float64": float64_product}


@functools.cache
def choose_kernel(device: torch.device) -> tuple[str, dict[str, float]]:
    """The fastest kernel that is exact here.

    Returns:
        Its name, and the speed of every exact kernel in billions of multiply-adds a second.
    """
    speeds = {name: speed for name, kernel in KERNELS.items() if (speed := _try(kernel, device)) is not None}
    return max(speeds, key=lambda name: speeds[name]), speeds


def _try(kernel: Kernel, device: torch.device) -> float | None:
    """Speed of a kernel on a typical shape, or None where it is missing or inexact."""
    generator = torch.Generator().manual_seed(0)
    for rows, depth, columns in ((1, 1, 1), (33, 1025, 17), (64, 4096, 64)):
        w = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
        x = torch.randint(-128, 128, (depth, columns), dtype=torch.int8, generator=generator)
        # Extreme values show kernels that saturate intermediate sums.
        w[0], x[:, 0] = -128, -128
        if rows > 1:
            w[1], x[:, 1] = 127, 127
        if not _exact(kernel, w.to(device), x.to(device)):
            return None
    # Weights are also used transposed, and digit planes with a stride between rows.
    w = torch.randint(-128, 128, (512, 256), dtype=torch.int8, generator=generator).to(device).t()
    x = torch.randint(-128, 128, (512, 3, 256), dtype=torch.int8, generator=generator).to(device)[:, 1]
    if not _exact(kernel, w, x):
        return None
    out = torch.empty(256, 256, dtype=torch.int32, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        kernel(w, x, out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 256 * 256 * 512 / best / 1e9


def _exact(kernel: Kernel, w: Tensor, x: Tensor) -> bool:
    out = torch.empty(w.shape[0], x.shape[1], dtype=torch.int32, device=w.device)
    try:
        kernel(w, x, out)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = w.cpu().to(torch.int64) @ x.cpu().to(torch.int64)
    return bool(torch.equal(out.cpu().to(torch.int64), expected))
