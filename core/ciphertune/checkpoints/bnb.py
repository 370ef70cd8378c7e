"""bitsandbytes: 4 bits (nf4, fp4), also with scales that are packed again, and 8 bits by row (LLM.int8).

In 4 bits ``weight`` is a string of values, two a byte with the first in the high half, ``weight.quant_map`` the 16
numbers that they stand for, ``weight.absmax`` the scale of each block; the rest is JSON in
``weight.quant_state.bitsandbytes__nf4``. In 8 bits ``weight`` is (N, K) int8, ``SCB`` each row's largest
value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.packed import Packed, Read, fail, grouped

_STATE = ".quant_state.bitsandbytes__"
_TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_LARGEST_STATE = 1 << 16


def bitsandbytes(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        weight, mark, kind = name.rpartition(_STATE)
        if mark:
            found[weight] = _four_bits(weight, name, kind, headers)
        module, _, leaf = name.rpartition(".")
        if leaf == "SCB":
            found[f"{module}.weight"] = _eight_bits(module, headers)
    return found


def _four_bits(weight: str, state: str, kind: str, headers: Mapping[str, Header]) -> Packed:
    names = {table: f"{weight}.{table}" for table in _TABLES if f"{weight}.{table}" in headers}
    header = headers[state]
    if kind not in ("nf4", "fp4") or header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > _LARGEST_STATE:
        raise fail(weight, f"its quant_state {kind!r} is none of bitsandbytes' in 4 bits")
    nested = "nested_absmax" in names
    needed = _TABLES if nested else _TABLES[:2]
    missing = next((table for table in needed if table not in names), None)
    if missing is not None or weight not in headers:
        raise fail(weight, f"there is no {missing or 'weight'} with its quant_state")

    def unpack(read: Read) -> Tensor:
        shape, block, inner, offset = _state(read(state), weight, nested)
        octets = read(weight).contiguous().view(torch.uint8).flatten()
        count = shape[0] * shape[1] if len(shape) == 2 else -1
        blocks = -(-count // block)
        scale = read(names["absmax"]).flatten()
        table = read(names["quant_map"]).to(torch.float32).flatten()
        if octets.numel() != -(-count // 2) or scale.numel() != blocks or table.numel() != 16:
            raise fail(weight, f"its {octets.numel()} bytes and {scale.numel()} scales are not those of {shape}")
        if nested:
            outer = read(names["nested_absmax"]).to(torch.float32).flatten()
            levels = read(names["nested_quant_map"]).to(torch.float32).flatten()
            if scale.dtype != torch.uint8 or outer.numel() != -(-blocks // inner) or levels.numel() != 256:
                raise fail(weight, f"its {blocks} scales are not packed in blocks of {inner}")
            scale = levels[scale.long()] * outer.repeat_interleave(inner)[:blocks] + offset
        scale = scale.to(torch.float32)
        out = torch.empty(count, dtype=torch.float32)
        step = block * max(1, (1 << 21) // block)
        for start in range(0, count, step):
            part = octets[start // 2 : (min(count, start + step) + 1) // 2]
            values = table[torch.stack([part >> 4, part & 15], dim=-1).flatten().long()][: count - start]
            factors = scale[start // block : -(-min(count, start + step) // block)].repeat_interleave(block)
            out[start : start + step] = values * factors[: len(values)]
        return out.reshape(shape)

    return Packed((weight, state, *names.values()), unpack)


def _state(stored: Tensor, name: str, nested: bool) -> tuple[tuple[int, ...], int, int, float]:
    """Shape, values of a block, scales of a block of these, and what is added to them. Raises ``ConfigError``."""
    try:
        content = json.loads(bytes(stored.tolist()).decode())
        shape = tuple(content["shape"])
        numbers = [*shape, content["blocksize"], content["nested_blocksize"] if nested else 1]
        offset = float(content["nested_offset"]) if nested else 0.0
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise fail(name, "its quant_state is damaged") from error
    if len(shape) != 2 or not all(type(each) is int and 0 < each < 1 << 31 for each in numbers) or numbers[2] % 2:
        raise fail(name, f"its quant_state names a shape {shape} in blocks of {numbers[-2]}")
    return shape, numbers[-2], numbers[-1], offset


def _eight_bits(module: str, headers: Mapping[str, Header]) -> Packed:
    name, scale, order = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    header = headers.get(name, Header("", ()))
    if header.dtype != "I8" or len(header.shape) != 2 or headers[scale] != Header("F32", header.shape[:1]):
        raise fail(name, "it is no int8 matrix with a number for each row in SCB")

    def codes(read: Read) -> tuple[Tensor, Tensor]:
        if order in headers and bool(read(order).any()):
            raise fail(name, "its rows are stored in an order for a kind of processor")
        return read(name), read(scale) / 127

    def unpack(read: Read) -> Tensor:
        values, factors = codes(read)
        return grouped(values, factors[:, None], None, None)

    return Packed(tuple(each for each in (name, scale, order) if each in headers), unpack, codes)
