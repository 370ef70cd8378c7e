"""HQQ: ``W_q`` uint8 with 8, 4, 2 or 1 bits a value, ``scale`` and ``zero`` of its groups, sizes in tensors beside it.

A matrix is reshaped to groups, along rows of ``W_q`` or along its columns; a byte holds values from as many equal parts
of the rows, that of the first part in its highest bits. See Badri and Shaji, "Half-Quadratic Quantization" (2023), and
the package ``hqq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.packed import Packed, Read, chunks, fail

_BITS = (1, 2, 4, 8)
_NEEDED = ("scale", "zero", "nbits", "group_size", "shape", "axis", "quant_scale", "quant_zero", "view_as_float")
_BESIDE = (
    "packing", "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_FLAGS = ("quant_scale", "quant_zero", "view_as_float")
_LARGEST = 1 << 31


def hqq(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        module, _, leaf = name.rpartition(".")
        if leaf == "W_q":
            found[f"{module}.weight"] = _layer(module, headers)
    return found


def _layer(module: str, headers: Mapping[str, Header]) -> Packed:
    name = f"{module}.W_q"
    missing = next((leaf for leaf in _NEEDED if f"{module}.{leaf}" not in headers), None)
    if missing is not None or len(headers[name].shape) != 2:
        raise fail(name, f"there is no {missing or 'matrix'} beside it, or its scales are packed themselves")
    if headers[name].dtype != "U8":
        raise fail(
            name, f"it is {headers[name].dtype}, and values of {', '.join(map(str, _BITS))} bits in bytes are known"
        )
    rows, columns = headers[name].shape
    of_groups = headers[f"{module}.scale"].shape
    beside = [each for each in (f"{module}.{leaf}" for leaf in (*_NEEDED, *_BESIDE)) if each in headers]

    def number(read: Read, leaf: str) -> int:
        value = read(f"{module}.{leaf}")
        if value.numel() != 1 or value.is_floating_point():
            raise fail(name, f"its {leaf} is no whole number")
        return int(value)

    def unpack(read: Read) -> Tensor:
        if any(number(read, leaf) for leaf in _FLAGS):
            raise fail(name, "its scales are packed themselves, or its bytes are stored as floating-point numbers")
        bits, axis, shape = number(read, "nbits"), number(read, "axis"), read(f"{module}.shape")
        if bits not in _BITS or axis not in (0, 1) or tuple(shape.shape) != (2,) or shape.is_floating_point():
            raise fail(name, f"it has {bits} bits a value along axis {axis}")
        n, k = (int(each) for each in shape.tolist())
        whole = rows * (8 // bits)
        groups = (1, columns) if axis == 0 else (whole, 1)
        if not 0 < n < _LARGEST or not 0 < k < _LARGEST or n * k != whole * columns or of_groups != groups:
            raise fail(name, f"its shape does not go with {n} by {k} values of {bits} bits and scales of {of_groups}")
        scale, zero = (read(f"{module}.{leaf}").to(torch.float32) for leaf in ("scale", "zero"))
        if zero.shape != scale.shape:
            raise fail(name, f"its zero of shape {tuple(zero.shape)} does not go with its scale")
        octets, mask = read(name), (1 << bits) - 1
        out = torch.empty(whole, columns, dtype=torch.float32)
        for part in range(8 // bits):
            target = out[part * rows : (part + 1) * rows]
            for chunk in chunks(rows, columns):
                target[chunk] = ((octets[chunk] >> (8 - bits * (part + 1))) & mask).to(torch.float32)
        for chunk in chunks(whole, columns):
            by = slice(None) if axis == 0 else chunk
            out[chunk] = (out[chunk] - zero[by]) * scale[by]
        return out.reshape(n, k)

    return Packed((name, *beside), unpack)
