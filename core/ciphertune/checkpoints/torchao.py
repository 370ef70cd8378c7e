"""torchao and quanto: int8 numbers, and 8-bit floating point, with scales by row or group of a row's columns.

torchao has ``_weight_qdata`` (N, K), ``_weight_scale`` (N, G) and perhaps ``_weight_zero_point`` (N, G), quanto
``weight._data`` (N, K) and ``weight._scale`` (N, 1). Their packed forms, for kernels of some processor, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.packed import Packed, Read, fail, grouped, groups_of

_NUMBERS = ("I8", "F8_E4M3")
_SCALES = ("F32", "F16", "BF16")
_ZEROS = ("I8", "I16", "I32", "I64", "F32", "F16", "BF16")
_SILENT = ("input_scale", "output_scale")
"""quanto's scales of activations, which are not rounded here."""


def torchao(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        module, mark, part = name.rpartition("._weight_")
        if not mark:
            continue
        if part not in ("qdata", "scale", "zero_point") or f"{module}._weight_qdata" not in headers:
            raise fail(
                name, "it belongs to a kind of torchao's tensors that is packed for kernels, or scales activations"
            )
        if part == "qdata":
            zeros = f"{module}._weight_zero_point"
            found[f"{module}.weight"] = _matrix(name, f"{module}._weight_scale", zeros, [], headers)
    return found


def quanto(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        module, mark, part = name.rpartition(".weight._")
        if mark and part not in ("data", "scale"):
            raise fail(name, "it belongs to one of quanto's packed kinds, and int8 and 8-bit floating point are known")
        if mark and part == "data":
            silent = [each for each in (f"{module}.{leaf}" for leaf in _SILENT) if each in headers]
            found[f"{module}.weight"] = _matrix(name, f"{module}.weight._scale", "", silent, headers)
    return found


def _matrix(name: str, scale: str, zeros: str, silent: list[str], headers: Mapping[str, Header]) -> Packed:
    shape, by = headers[name].shape, headers.get(scale, Header("", ()))
    if headers[name].dtype not in _NUMBERS or len(shape) != 2 or by.dtype not in _SCALES:
        raise fail(
            name, f"it is {headers[name].dtype} of shape {shape}, and {' and '.join(_NUMBERS)} matrices are known"
        )
    n, k = shape
    if len(by.shape) != 2 or by.shape[0] != n or by.shape[1] < 1 or k % by.shape[1]:
        raise fail(name, f"its scale of shape {by.shape} does not go with its shape {shape}")
    count = by.shape[1]
    pointed = zeros in headers
    if pointed and (headers[zeros].dtype not in _ZEROS or headers[zeros].shape != by.shape):
        raise fail(zeros, "it is no table like the scales beside it")

    def unpack(read: Read) -> Tensor:
        points = read(zeros) if pointed else None
        return grouped(read(name), read(scale), points, groups_of(k, k // count) if count > 1 else None)

    def codes(read: Read) -> tuple[Tensor, Tensor] | None:
        if pointed and bool(read(zeros).any()):
            return None
        return read(name), read(scale)[:, 0].to(torch.float32)

    whole = headers[name].dtype == "I8" and count == 1
    return Packed((name, scale, *([zeros] if pointed else []), *silent), unpack, codes if whole else None)
