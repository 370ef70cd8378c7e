"""compressed-tensors, as vLLM's and Neural Magic's checkpoints are: int-quantized, pack-quantized, float-quantized.

``weight`` (N, K) in int8 or 8-bit floating point, or ``weight_packed`` (N, K · bits / 32) int32, whose numbers are
signed with an offset of half their range, or ``weight_packed`` in 4-bit floating point (``fours``). ``weight_scale`` is
one number, one a row, one a group of a row's columns, or one a block. ``weight_zero_point`` is signed as the numbers
are, and packed along its rows where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.floats import EIGHT_BITS, scaled
from ciphertune.checkpoints.fours import fours
from ciphertune.checkpoints.packed import Packed, Read, checked_groups, fail, grouped, groups_of, words

_BITS = (2, 4, 8)
_SCALES = ("F32", "F16", "BF16")
_SILENT = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""Scales of activations, which are not rounded here."""


def compressed(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    schemes = list(_schemes(settings))
    turned = (settings.get("transform_config") or {}).get("config_groups")
    found = {}
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        packed = None
        if leaf == "weight" and header.dtype in EIGHT_BITS:
            block = next((each["block_structure"] for each in schemes if each.get("block_structure")), None)
            packed = scaled(name, headers, block)
        elif leaf == "weight_packed" and header.dtype == "U8":
            packed = fours(name, headers, f"{module}.weight_global_scale", divide=True)
        elif (leaf == "weight" and header.dtype == "I8") or leaf == "weight_packed":
            packed = _layer(module, name, headers, schemes)
        if packed is None:
            continue
        if turned:
            raise fail(name, "the model turns its activations (transform_config), which its weights alone do not do")
        found[f"{module}.weight"] = packed
    return found


def _schemes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How weights are stored, of each group of layers."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def _layer(module: str, name: str, headers: Mapping[str, Header], schemes: list[Mapping[str, Any]]) -> Packed:
    scale, zeros, index, shape = (
        f"{module}.{leaf}" for leaf in ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    )
    whole = headers[name].dtype == "I8"
    if scale not in headers or headers[scale].dtype not in _SCALES or len(headers[name].shape) != 2:
        raise fail(name, f"it is no matrix with a scale {scale!r} beside it")
    if not whole and (headers[name].dtype != "I32" or headers.get(shape) not in _SHAPES):
        raise fail(name, f"it is {headers[name].dtype} where int32 with a {shape!r} beside it is known")
    sizes = sorted({size for each in schemes if isinstance(size := each.get("group_size"), int)})
    widths = [bits for bits in _BITS if any(each.get("num_bits") == bits for each in schemes if _whole(each))]
    rows = headers[name].shape[0]
    by = headers[scale].shape
    count = by[1] if len(by) == 2 else 1
    if by not in ((), (1,), (rows,), (rows, count)):
        raise fail(name, f"its scale of shape {by} does not go with its {rows} rows")
    beside = (scale, zeros, index, shape, *(f"{module}.{leaf}" for leaf in _SILENT))
    parts = (name, *(each for each in beside if each in headers))

    def unpacked(read: Read) -> tuple[Tensor, Tensor, Tensor | None]:
        """Numbers, scales by row and group, zero points."""
        packed, factors = read(name), read(scale)
        factors = factors.reshape(-1, 1) if factors.dim() < 2 else factors
        if whole:
            points = read(zeros) if zeros in headers else None
            return packed, factors, None if points is None else _fitting(points, rows, count, zeros)
        n, k = (int(each) for each in read(shape).tolist())
        fits = [bits for bits in widths if n == rows and k > 0 and -(-k * bits // 32) == packed.shape[1]]
        if len(fits) != 1:
            raise fail(name, f"its shape does not go with {n} by {k} values of {' or '.join(map(str, widths))} bits")
        bits = fits[0]
        values = _signed(words(packed, bits)[:, :k], bits)
        if zeros not in headers:
            return values, factors, None
        if headers[zeros] != Header("I32", (-(-rows * bits // 32), count)):
            raise fail(zeros, f"it is not packed as those of {rows} rows and {count} groups are")
        return values, factors, _signed(words(read(zeros).t(), bits)[:, :rows], bits).t()

    def unpack(read: Read) -> Tensor:
        values, factors, points = unpacked(read)
        k = values.shape[1]
        group = None
        if index in headers and count > 1:
            group = checked_groups(read(index), k, count, index)
        elif count > 1:
            fitting = [size for size in sizes if size > 0 and -(-k // size) == count]
            if len(fitting) != 1:
                raise fail(name, f"its {k} inputs are not in {count} groups of {' or '.join(map(str, sizes))}")
            group = groups_of(k, fitting[0])
        return grouped(values, factors, points, group)

    def codes(read: Read) -> tuple[Tensor, Tensor] | None:
        values, factors, points = unpacked(read)
        if points is not None and bool(points.any()):
            return None
        return values.to(torch.int8), factors[:, 0].to(torch.float32).expand(rows)

    return Packed(parts, unpack, codes if count == 1 and (whole or 8 in widths) else None)


_SHAPES = (Header("I64", (2,)), Header("I32", (2,)))


def _whole(scheme: Mapping[str, Any]) -> bool:
    return str(scheme.get("type", "int")) == "int"


def _signed(values: Tensor, bits: int) -> Tensor:
    return (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _fitting(points: Tensor, rows: int, count: int, name: str) -> Tensor:
    points = points.reshape(-1, 1) if points.dim() < 2 else points
    if points.shape[0] not in (1, rows) or points.shape[1] != count or points.is_floating_point():
        raise fail(name, f"it is no table of {rows} rows and {count} groups")
    return points.expand(rows, count)
