"""AWQ, as AutoAWQ writes it for its "gemm" kernels, in 4 bits.

``qweight`` (K, N / 8) int32 holds a layer's rows, eight outputs a word in the order 0 2 4 6 1 3 5 7, ``qzeros``
(G, N / 8) the zero points likewise, ``scales`` (G, N) the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.checkpoints.packed import Packed, Read, fail, grouped, groups_of, words

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word each of eight outputs is."""


def awq(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See ``Format``."""
    found = {}
    for name in headers:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            found[f"{module}.weight"] = _layer(module, headers, settings)
        elif leaf == "scales" and f"{module}.qweight" not in headers:
            raise fail(name, "it scales an activation, which the model here does not")
    return found


def _layer(module: str, headers: Mapping[str, Header], settings: Mapping[str, Any]) -> Packed:
    name, zeros, scales = (f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise fail(name, f"it is in the format {version!r} with {bits!r} bits, and 'gemm' with 4 is known")
    missing = next((each for each in (zeros, scales) if len(headers.get(each, Header("", ())).shape) != 2), None)
    if missing is not None or len(headers[name].shape) != 2:
        raise fail(name, f"there is no matrix {missing or name!r} beside it")
    k, packed = headers[name].shape
    count, n = headers[scales].shape
    if headers[name].dtype != "I32" or headers[zeros] != Header("I32", (count, packed)) or n != 8 * packed:
        raise fail(name, "its shape does not go with those of qzeros and scales beside it")
    if count == 0 or k % count:
        raise fail(name, f"its {k} inputs are not in {count} groups")

    def unpack(read: Read) -> Tensor:
        values, points = (_ordered(words(read(each), 4)).t() for each in (name, zeros))
        return grouped(values, read(scales).t(), points, groups_of(k, k // count))

    return Packed((name, zeros, scales), unpack)


def _ordered(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, 8)[..., _PLACES].flatten(-2)
