"""GPTQ, as AutoGPTQ and GPTQModel write it.

``qweight`` (K · bits / 32, N) int32 holds the columns of a layer as strings of bits, ``qzeros`` (G, N · bits / 32) the
zero points, less one in the first version of the format, ``scales`` (G, N) the scales, ``g_idx`` (K,) the group of each
input, which is in order where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.packed import Packed, Read, checked_groups, fail, grouped, groups_of, words

_BITS = (2, 3, 4, 8)


def gptq(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            found[f"{module}.weight"] = _layer(module, headers, settings)
    return found


def _layer(module: str, headers: Mapping[str, Header], settings: Mapping[str, Any]) -> Packed:
    name = f"{module}.qweight"
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise fail(name, f"it is in the format {version!r}, and 'gptq' and 'gptq_v2' are known")
    parts = [f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx") if f"{module}.{leaf}" in headers]
    for needed in (name, f"{module}.qzeros", f"{module}.scales"):
        if needed not in headers or len(headers[needed].shape) != 2:
            raise fail(name, f"there is no matrix {needed!r} beside it")
    index = f"{module}.g_idx" if f"{module}.g_idx" in headers else None
    rows, n = headers[name].shape
    bits, size = settings.get("bits"), settings.get("group_size", -1)
    if settings.get("dynamic") and index is not None:
        # Settings may differ from layer to layer.
        columns = headers[index].shape[0]
        bits = rows * 32 // max(columns, 1)
    if bits not in _BITS or (rows * 32) % bits:
        raise fail(name, f"it has {bits} bits a value, and {', '.join(map(str, _BITS))} are known")
    k = rows * 32 // bits
    count = headers[f"{module}.scales"].shape[0]
    fits = (
        headers[name].dtype == "I32"
        and headers[f"{module}.qzeros"] == Header("I32", (count, n * bits // 32))
        and headers[f"{module}.scales"].shape == (count, n)
        and n * bits % 32 == 0
    )
    if not fits:
        raise fail(name, f"its shape does not go with those of qzeros and scales beside it, with {bits} bits")
    if index is None and (type(size) is not int or -(-k // (size if size > 0 else k)) != count):
        raise fail(name, f"its {k} inputs are not in {count} groups of {size!r}")
    one = 0 if version == "gptq_v2" else 1

    def tables(read: Read) -> tuple[Tensor, Tensor, Tensor]:
        values = words(read(name).t(), bits)
        zeros = (words(read(f"{module}.qzeros"), bits).to(torch.int16) + one) & ((1 << bits) - 1)
        return values, zeros.t(), read(f"{module}.scales").t()

    def unpack(read: Read) -> Tensor:
        values, zeros, scale = tables(read)
        if index is not None:
            group = checked_groups(read(index), k, count, index)
        else:
            group = groups_of(k, size if size > 0 else k)
        return grouped(values, scale, zeros, group)

    def codes(read: Read) -> tuple[Tensor, Tensor] | None:
        values, zeros, scale = tables(read)
        if not bool((zeros == 128).all()):
            return None
        return (values.to(torch.int16) - 128).to(torch.int8), scale[:, 0].to(torch.float32)

    return Packed(tuple(parts), unpack, codes if bits == 8 and count == 1 else None)
