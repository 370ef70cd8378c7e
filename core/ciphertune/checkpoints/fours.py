"""Matrices in 4-bit floating point (E2M1), two values a byte, the first in the low half: NVFP4, and MXFP4 of layers.

NVFP4 has a scale in 8-bit floating point for each 16 values of a row, and a number for the whole tensor:
compressed-tensors divides by it (``weight_global_scale``), ModelOpt multiplies with it (``weight_scale_2``). MXFP4 has
exponents with an offset of 127 for each 32 values of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.floats import scaled
from ciphertune.checkpoints.packed import Packed, Read, fail, grouped, groups_of

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SILENT = ("input_scale", "input_global_scale", "k_scale", "v_scale")
"""Scales of activations and of caches, which are not rounded here."""


def modelopt(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``: NVIDIA's ModelOpt, NVFP4 and 8-bit floating point."""
    found = {}
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and header.dtype == "U8":
            found[name] = fours(name, headers, f"{module}.weight_scale_2", divide=False)
        elif leaf == "weight" and header.dtype == "F8_E4M3":
            found[name] = scaled(name, headers, None)
    return found


def fours(name: str, headers: Mapping[str, Header], number: str, *, divide: bool) -> Packed:
    """A matrix in 4-bit floating point.

    Args:
        name: of its bytes, (N, K / 2).
        headers: of the checkpoint.
        number: name of the number for the whole of an NVFP4 tensor.
        divide: whether scales are divided by it.

    Raises:
        ConfigError: its scales are missing, or of no known form.
    """
    module = name.rpartition(".")[0]
    scale = f"{module}.weight_scale"
    shape = headers[name].shape
    if headers[name].dtype != "U8" or len(shape) != 2 or scale not in headers:
        raise fail(name, f"it is no matrix of bytes with scales {scale!r} beside it")
    n, k = shape[0], 2 * shape[1]
    kinds = {Header("F8_E4M3", (n, k // 16)): 16, Header("U8", (n, k // 32)): 32}
    size = kinds.get(headers[scale])
    if size is None or k % size or f"{module}.weight_zero_point" in headers:
        raise fail(name, f"its scales {headers[scale].dtype} {headers[scale].shape} are neither NVFP4's nor MXFP4's")
    whole = size == 16
    if whole and (number not in headers or headers[number].dtype != "F32" or headers[number].shape not in ((), (1,))):
        raise fail(name, f"there is no float32 number {number!r} beside it")
    silent = [each for each in (f"{module}.{leaf}" for leaf in _SILENT) if each in headers]

    def unpack(read: Read) -> Tensor:
        octets = read(name)
        table = torch.tensor([*VALUES, *(-value for value in VALUES)])
        values = table[torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2).int()]
        if not whole:
            factors = torch.ldexp(torch.ones(()), read(scale).to(torch.int32) - 127)
        else:
            once = read(number).to(torch.float32).reshape(())
            factors = read(scale).to(torch.float32)
            factors = factors / once if divide else factors * once
        return grouped(values, factors, None, groups_of(k, size))

    return Packed((name, scale, *([number] if whole else []), *silent), unpack)
