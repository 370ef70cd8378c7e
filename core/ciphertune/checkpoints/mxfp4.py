"""MXFP4, as gpt-oss has its experts: ``…_blocks`` (E, N, G, 16) uint8 with two values a byte, ``…_scales`` (E, N, G).

The values are 4-bit floating-point numbers (E2M1), the first in a byte's low half; the scales are powers of two, as
their exponents with an offset of 127. See the Open Compute Project's "Microscaling Formats (MX) Specification" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.fours import VALUES
from ciphertune.checkpoints.packed import Packed, Read, fail


def mxfp4(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        if name.endswith("_blocks"):
            plain = name.removesuffix("_blocks")
            found[plain] = _experts(name, f"{plain}_scales", headers)
    return found


def _experts(name: str, scales: str, headers: Mapping[str, Header]) -> Packed:
    dtype, shape = headers[name]
    if dtype != "U8" or len(shape) != 4 or headers.get(scales) != Header("U8", shape[:3]):
        raise fail(name, "it is not in blocks of bytes with a scale each beside it")

    def unpack(read: Read) -> Tensor:
        blocks, exponents = read(name), read(scales)
        # bfloat16 holds four-bit numbers times powers of two exactly.
        table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16)
        out = torch.empty((shape[0], shape[2] * shape[3] * 2, shape[1]), dtype=torch.bfloat16)
        for expert, (part, exponent) in enumerate(zip(blocks, exponents, strict=True)):
            values = table[torch.stack([part & 15, part >> 4], dim=-1).flatten(-2).int()]
            powers = torch.ldexp(values, exponent.to(torch.int32)[..., None] - 127)
            out[expert] = powers.flatten(-2).t()
        return out

    return Packed((name, scales), unpack)
