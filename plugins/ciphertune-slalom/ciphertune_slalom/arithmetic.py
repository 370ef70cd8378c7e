"""Matrix products modulo 2^32, exact, of float64 products whose sums stay below 2^53."""

from __future__ import annotations

import torch
from torch import Tensor

_DEPTH = 1 << 14
"""Summands of a product of values below 2^31 and codes up to 2^7: 2^31 · 2^7 · 2^14 = 2^52."""
_HELD = 1 << 22
"""Numbers converted to float64 at once."""


def product(values: Tensor, codes: Tensor) -> Tensor:
    """``values · codesᵀ`` modulo 2^32.

    Args:
        values: (T, K) int32.
        codes: (N, K) int8, of any strides, on the device of ``values``.

    Returns:
        (T, N) int32, contiguous.
    """
    found = torch.zeros(len(values), len(codes), dtype=torch.int32, device=values.device)
    for first, last in _parts(values.shape[1], _DEPTH):
        step = max(16, _HELD // (last - first))
        for top, bottom in _parts(len(values), step):
            held = values[top:bottom, first:last].to(torch.float64)
            for left, right in _parts(len(codes), step):
                exact = held @ codes[left:right, first:last].to(torch.float64).t()
                found[top:bottom, left:right] += wrapped(exact)
    return found


def wide_product(values: Tensor, weights: Tensor) -> Tensor:
    """``values · weightsᵀ`` modulo 2^32, of int32 both, by products of 16-bit halves; those of high ones count nothing.

    Args:
        values: (T, K) int32, K up to 2^20.
        weights: (N, K) int32, few rows.

    Returns:
        (T, N) int32.
    """
    found = torch.empty(len(values), len(weights), dtype=torch.int32, device=values.device)
    w_low, w_high = (half.t() for half in _halves(weights))
    for top, bottom in _parts(len(values), max(16, _HELD // values.shape[1])):
        v_low, v_high = _halves(values[top:bottom])
        found[top:bottom] = wrapped(v_low @ w_low) + wrapped(v_low @ w_high + v_high @ w_low).bitwise_left_shift(16)
    return found


def wrapped(values: Tensor) -> Tensor:
    """Whole numbers below 2^53 modulo 2^32, as int32."""
    return values.to(torch.int64).to(torch.int32)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The low 16 bits, unsigned, and the signed high ones, as float64."""
    return values.bitwise_and(0xFFFF).to(torch.float64), values.bitwise_right_shift(16).to(torch.float64)


def _parts(count: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, count)) for start in range(0, count, step)]
