"""Values mod 2^32 as bytes: unsigned little-endian planes.

On the wire and in memory, planes of one row stand together: (rows, planes, columns), lowest plane first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune_mlwe.native import library_for, pointer


def split_bytes(values: Tensor, out: Tensor) -> None:
    """The lowest bytes of values.

    Args:
        values: (rows, columns) int32, contiguous.
        out: (rows, planes, columns) uint8 to write to, columns contiguous.
    """
    native = library_for(values)
    rows, planes, columns = out.shape
    if native is not None:
        native.ct_split(pointer(values), rows, columns, planes, pointer(out), out.stride(0), out.stride(1))
        return
    for plane in range(planes):
        out[:, plane].copy_(values.bitwise_right_shift(8 * plane).bitwise_and_(0xFF))


def join_bytes(planes: Tensor) -> Tensor:
    """The values of all planes as (rows, columns) float64, centred: those mod 2^24 lie in ±2^23."""
    rows, count, columns = planes.shape
    out = torch.empty(rows, columns, dtype=torch.float64, device=planes.device)
    native = library_for(planes) if planes.stride(2) == 1 and count in (3, 4) else None
    if native is not None:
        native.ct_join(pointer(planes), planes.stride(0), planes.stride(1), count, rows, columns, pointer(out))
        return out
    out.copy_(planes[:, count - 1])
    out.sub_(256 * (out >= 128))
    for index in range(count - 2, -1, -1):
        out.mul_(256).add_(planes[:, index])
    return out


def lifted(planes: Tensor) -> Tensor:
    """The values of planes as (rows, columns) int32, shifted to the top of 32 bits."""
    count = planes.shape[1]
    total = torch.zeros(planes.shape[0], planes.shape[2], dtype=torch.int32, device=planes.device)
    for index in range(count):
        total.bitwise_or_(planes[:, index].to(torch.int32).bitwise_left_shift_(8 * (4 - count + index)))
    return total


def low_bits(values: Tensor) -> Tensor:
    """The low 32 bits of float64 values rounded to nearest, as int32; |v| < 2⁵¹. ``values`` is overwritten.

    Adding 1.5·2⁵² leaves the rounded integer in the mantissa's low bits.
    """
    return values.add_(6755399441055744.0).view(torch.int64).to(torch.int32)


def digits_of(codes: Tensor) -> tuple[Tensor, ...]:
    """Codes as balanced base-256 digits, each (rows, K) int8, lowest first: int8 codes as they are, int16 as two.

    Each digit is a product of its own and the client puts the results together: evaluated as one, the larger codes
    would leave the message that much less of the 32 bits.
    """
    if codes.dtype == torch.int8:
        return (codes,)
    # Conversion keeps the low byte, which is the balanced digit.
    low = codes.to(torch.int8)
    return low, ((codes.to(torch.int32) - low).bitwise_right_shift_(8)).to(torch.int8)
