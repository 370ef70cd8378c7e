"""Whether tensors and their rows are finite, in time that does not tell of the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Whether no value of a floating-point tensor, which is not empty, is NaN or infinite.

    Both ends in one pass, whatever the values are: what was decrypted must not show in how long this takes. In the
    order of the memory, which is column by column of some matrices: across it this takes several times as long.
    """
    values = x.t() if x.dim() == 2 and x.stride(0) == 1 else x
    low, high = torch.aminmax(values)
    # NaN anywhere is what both ends are.
    return math.isfinite(low.item()) and math.isfinite(high.item())


def zeroed(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x, (rows, K), with zeros in the rows that are not finite, and which rows these are, (rows, 1) bool."""
    overflown = ~x.isfinite().all(dim=1, keepdim=True)
    return x.masked_fill(overflown, 0.0), overflown
