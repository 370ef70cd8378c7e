"""Weights in 8-bit floating point with scales: a number, one a row, or one a block.

As DeepSeek's checkpoints have them (``weight_scale_inv`` by blocks of 128 rows and 128 columns; despite its name it is
multiplied), Fbgemm's and compressed-tensors' (``weight_scale``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.packed import Packed, Read, chunks, fail

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "F16", "BF16", "F8_E8M0")
_SILENT = ("input_scale", "activation_scale", "output_scale")
"""Scales of activations, which are not rounded here."""


def fp8(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    block = settings.get("weight_block_size")
    return {name: scaled(name, headers, block) for name, header in headers.items() if header.dtype in EIGHT_BITS}


def scaled(name: str, headers: Mapping[str, Header], block: Sequence[int] | None) -> Packed:
    """A tensor in 8-bit floating point.

    Args:
        name: of the tensor, (…, N, K).
        headers: of the checkpoint.
        block: rows and columns that one scale is for, where the settings tell.

    Raises:
        ConfigError: its scale is missing or of no known shape.
    """
    scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in headers), None)
    if scale is None or headers[scale].dtype not in _SCALES:
        raise fail(name, "it is in 8-bit floating point without a scale beside it")
    shape, found = headers[name].shape, headers[scale].shape
    by = _unit(shape, found, block)
    if by is None:
        raise fail(name, f"its scale of shape {found} does not go with its shape {shape}")
    module = name.rpartition(".")[0]
    silent = [each for each in (f"{module}.{leaf}" for leaf in _SILENT) if each in headers]

    def unpack(read: Read) -> Tensor:
        values, factors = read(name), read(scale).to(torch.float32)
        rows, columns = by
        if len(shape) < 2 or rows == 0:
            return values.to(torch.float32) * factors.reshape((1,) * len(shape))
        if factors.dim() < len(shape):
            factors = factors.unsqueeze(-1)
        flat, small = values.reshape(-1, *shape[-2:]), factors.reshape(-1, *factors.shape[-2:])
        out = torch.empty(flat.shape, dtype=torch.float32)
        column = torch.arange(shape[-1]) // columns
        for each, unit, target in zip(flat, small, out, strict=True):
            for part in chunks(*each.shape):
                row = torch.arange(part.start, min(part.stop, shape[-2])) // rows
                target[part] = each[part].to(torch.float32) * unit[row][:, column]
        return out.reshape(shape)

    return Packed((name, scale, *silent), unpack)


def _unit(shape: tuple[int, ...], scale: tuple[int, ...], block: Sequence[int] | None) -> tuple[int, int] | None:
    """Rows and columns that one scale is for; zeros where one is for all, None where they cannot be told."""
    if all(size == 1 for size in scale):
        return 0, 0
    if len(shape) < 2:
        return None
    n, k = shape[-2:]
    if scale in (shape[:-1], (*shape[:-1], 1)):
        return 1, k
    if scale == (*shape[:-2], 1, 1):
        return n, k
    if block is not None and len(block) == 2 and all(type(each) is int and each > 0 for each in block):
        rows, columns = block
        if scale == (*shape[:-2], -(-n // rows), -(-k // columns)):
            return rows, columns
    return None
