"""Values mod 2^32 as balanced base-256 digits: int8 planes that an int8 matrix product takes as they are.

``v = Σ digit_i · 256^i`` with digits in [-128, 127]. Leaving out the lowest digits rounds v to nearest (what is left
out is at most 0.502 of the lowest kept digit's unit), so planes are also how a value is switched to a smaller
modulus. On the wire and in memory, planes of one feature stand together: (features, planes, columns), lowest kept
digit first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(values: Tensor, out: Tensor, dropped: int) -> None:
    """Split into digits; ``values`` is overwritten.

    Args:
        values: (rows, columns) int32.
        out: (rows, planes, columns) int8 to write to.
        dropped: how many of the lowest digits to round away; planes + dropped ≤ 4.
    """
    for _ in range(dropped):
        _next_digit(values)
    planes = out.shape[1]
    for index in range(planes):
        # Conversion keeps the low byte, which is the balanced digit.
        out[:, index].copy_(values)
        if index + 1 < planes:
            _next_digit(values)


def _next_digit(values: Tensor) -> None:
    # (v − digit) / 256 = ⌊(v + 128) / 256⌋; an overflow at 2³¹ wraps, which is right mod 2³².
    values.add_(128).bitwise_right_shift_(8)


def compose(planes: Tensor, out: Tensor) -> Tensor:
    """The values of planes, in units of the lowest plane's digit.

    Args:
        planes: (rows, planes, columns) int8.
        out: (rows, columns) float64 to write to.
    """
    count = planes.shape[1]
    out.copy_(planes[:, count - 1])
    for index in range(count - 2, -1, -1):
        out.mul_(256).add_(planes[:, index])
    return out


def low_bits(values: Tensor) -> Tensor:
    """The low 32 bits of float64 values rounded to nearest, as int32; |v| < 2⁵¹. ``values`` is overwritten.

    Adding 1.5·2⁵² leaves the rounded integer in the mantissa's low bits.
    """
    return values.add_(6755399441055744.0).view(torch.int64).to(torch.int32)
