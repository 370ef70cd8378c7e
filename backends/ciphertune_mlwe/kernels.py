"""Exact integer matrix products, chosen by trying them on this machine rather than by guess."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], None]
"""``kernel(w, x, out)``: w (N, K) int8 times x (K, C) int8 into out (N, C) int32, exact mod 2^32."""

_FEWEST = 2
"""The least that a size must be for a layout to be clear from strides."""

MAX_DEPTH = 1 << 15
"""Products longer than this are cut: 2^15 · 128 · 255 stays inside int32 even with unsigned operands."""


def int8_product(w: Tensor, x: Tensor, out: Tensor) -> None:
    """The processor's own int8 product with int32 accumulation (VNNI, AMX, tensor cores)."""
    if w.device.type == "cuda":
        # cuBLASLt wants more than 16 rows and multiples of 8 elsewhere.
        _padded_product(w, x, out, max(0, 17 - w.shape[0]), -w.shape[1] % 8, -x.shape[1] % 8)
    elif min(*w.shape, x.shape[1]) < _FEWEST:
        # The stride of a dimension of size 1 says nothing, and libraries read the layout of a matrix from strides.
        _padded_product(w, x, out, *(max(0, _FEWEST - size) for size in (*w.shape, x.shape[1])))
    else:
        torch._int_mm(_plain(w), _plain(x), out=out)


def float64_product(w: Tensor, x: Tensor, out: Tensor) -> None:
    """A portable product: every sum is an integer below 2^53, so float64 is exact."""
    out.copy_(torch.mm(w.to(torch.float64), x.to(torch.float64)))


def _padded_product(w: Tensor, x: Tensor, out: Tensor, rows: int, depth: int, columns: int) -> None:
    """The product of copies with so many rows, summands and columns of zeros more, which change no sum."""
    wide = torch.nn.functional.pad(w, (0, depth, 0, rows)).contiguous()
    tall = torch.nn.functional.pad(x, (0, columns, 0, depth)).contiguous()
    out.copy_(torch._int_mm(wide, tall)[: w.shape[0], : x.shape[1]])


def _plain(matrix: Tensor) -> Tensor:
    """The matrix, copied unless it is stored row by row or column by column without overlap."""
    (rows, columns), strides = matrix.shape, matrix.stride()
    plain = (strides[1] == 1 and strides[0] >= columns) or (strides[0] == 1 and strides[1] >= rows)
    return matrix if plain else matrix.contiguous()


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
    for rows, depth, columns in (
        *itertools.product((1, 2, 19), (1, 2, 33), (1, 2, 17)),
        (33, 1025, 17),
        (64, 4096, 64),
    ):
        w = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
        x = torch.randint(-128, 128, (depth, columns), dtype=torch.int8, generator=generator)
        # Extreme values show kernels that saturate intermediate sums.
        w[0], x[:, 0] = -128, -128
        if rows > 1 and columns > 1:
            w[1], x[:, 1] = 127, 127
        w, x = w.to(device), x.to(device)
        layouts = [(w, x)] if depth > 33 else itertools.product(weight_layouts(w), plane_layouts(x))
        if not all(_exact(kernel, *each) for each in layouts):
            return None
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


def weight_layouts(weight: Tensor) -> list[Tensor]:
    """A weight (N, K) int8 in every layout that evaluation hands to a kernel.

    Rows in order; digits with another digit between rows; both transposed; and of each a range of the summands.
    """
    rows, depth = weight.shape
    found = []
    for matrix, back in ((weight, False), (weight.t(), True)):
        between = torch.zeros(matrix.shape[0], 2, matrix.shape[1], dtype=torch.int8, device=weight.device)
        between[:, 1] = matrix
        for stored in (matrix.contiguous(), between[:, 1]):
            found.append(stored.t() if back else stored)
    longer = torch.zeros(rows, depth + 3, dtype=torch.int8, device=weight.device)
    longer[:, 2 : 2 + depth] = weight
    return [*found, longer[:, 2 : 2 + depth], longer.t().contiguous().t()[:, 2 : 2 + depth]]


def plane_layouts(planes: Tensor) -> list[Tensor]:
    """One digit (K, C) int8 of ciphertexts in every layout that evaluation hands to a kernel.

    In order; with other digits between rows; and a range of columns of that.
    """
    depth, columns = planes.shape
    between = torch.zeros(depth, 3, columns + 5, dtype=torch.int8, device=planes.device)
    between[:, 1, 2 : 2 + columns] = planes
    whole = between[:, :, 2 : 2 + columns].contiguous()
    return [planes, whole[:, 1], between[:, 1, 2 : 2 + columns]]


def _exact(kernel: Kernel, w: Tensor, x: Tensor) -> bool:
    out = torch.empty(w.shape[0], x.shape[1], dtype=torch.int32, device=w.device)
    try:
        kernel(w, x, out)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = w.cpu().to(torch.int64) @ x.cpu().to(torch.int64)
    return bool(torch.equal(out.cpu().to(torch.int64), expected))
