"""Weights as workers hold them, and what a client may know of them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Direction, LinearMap, WeightBits
from ciphertune.errors import ProtocolError, UnknownLayerError, UnsupportedLayerError

_CODE_DTYPES = {8: torch.int8, 16: torch.int16}
# 16-bit codes stop where two balanced base-256 digits do: 127 · 257.
_LARGEST_CODE = {8: 127, 16: 32639}


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """What a client knows of one outsourced layer: everything but the weight.

    Attributes:
        name: dotted path of the layer in the model.
        in_features, out_features: K and N of ``y = x Wᵀ``, W of shape (N, K).
        weight_bits: 8 or 16 for integer codes, None for float32.
        scale: (N,) float32, ``W = diag(scale) · codes``; None where the weight is float32.
        max_row_norm, max_column_norm: largest Euclidean norm of a row and of a column of the codes.
        digest: SHA-256 of the codes and scales, hexadecimal.
    """

    name: str
    in_features: int
    out_features: int
    weight_bits: WeightBits | None
    scale: Tensor | None = dataclasses.field(repr=False)
    max_row_norm: float
    max_column_norm: float
    digest: str


@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """A weight as a worker holds it: codes of shape (N, K) and, for integer codes, one scale per output channel."""

    codes: Tensor
    scale: Tensor | None

    def dequantize(self) -> Tensor:
        """The float32 weight that the codes stand for, shape (N, K)."""
        if self.scale is None:
            return self.codes.clone()
        return self.codes.float() * self.scale[:, None]


def quantize(weight: Tensor, bits: WeightBits | None) -> LayerWeight:
    """Symmetric quantization, one scale per output channel (row), rounding to nearest.

    Args:
        weight: (N, K), any floating dtype.
        bits: 8 (codes in ±127) or 16 (codes in ±32639), or None to keep float32.

    Raises:
        UnsupportedLayerError: the weight holds NaN or infinity.
    """
    weight = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise UnsupportedLayerError("the weight holds NaN or infinity")
    if bits is None:
        return LayerWeight(weight.contiguous().clone(), None)
    top = float(_LARGEST_CODE[bits])
    scale = weight.abs().amax(dim=1) / top
    # An all-zero row, or one so small that its scale underflows, quantizes to zeros.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.div(weight, scale[:, None]).round_().clamp_(-top, top).to(_CODE_DTYPES[bits])
    return LayerWeight(codes, scale)


def describe(name: str, weight: LayerWeight) -> LayerInfo:
    """The client's view of a weight."""
    values = weight.codes.to(torch.float64)
    digest = hashlib.sha256(_raw(weight.codes))
    if weight.scale is not None:
        digest.update(_raw(weight.scale))
    n, k = weight.codes.shape
    bits: WeightBits | None = {torch.int8: 8, torch.int16: 16}.get(weight.codes.dtype)  # type: ignore[assignment]
    return LayerInfo(
        name=name,
        in_features=k,
        out_features=n,
        weight_bits=bits,
        scale=weight.scale,
        max_row_norm=float(torch.linalg.vector_norm(values, dim=1).max()),
        max_column_norm=float(torch.linalg.vector_norm(values, dim=0).max()),
        digest=digest.hexdigest(),
    )


def _raw(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def group_map(layers: Sequence[LayerInfo], direction: Direction) -> LinearMap:
    """The map of layers that share one input, their outputs concatenated (forward) or summed (backward)."""
    label = f"{' + '.join(layer.name for layer in layers)} ({direction})"
    features = layers[0].in_features
    outputs = sum(layer.out_features for layer in layers)
    if direction == "forward":
        return LinearMap(label, "forward", features, outputs, max(layer.max_row_norm for layer in layers))
    # A column of the stacked matrix is the layers' columns one after the other.
    norm = math.sqrt(sum(layer.max_column_norm**2 for layer in layers))
    return LinearMap(label, "backward", outputs, features, norm)


class WeightStore:
    """The weights one worker serves, by layer name. One copy in memory serves every group and session."""

    def __init__(self, weights: Mapping[str, LayerWeight] | None = None) -> None:
        self._weights: dict[str, LayerWeight] = dict(weights or {})
        self._stacks: dict[tuple[str, ...], Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __getitem__(self, name: str) -> LayerWeight:
        try:
            return self._weights[name]
        except KeyError:
            raise UnknownLayerError(f"this worker holds no layer named {name!r}") from None

    def add(self, name: str, weight: LayerWeight) -> None:
        """Hold a weight under a name not used before."""
        if name in self._weights:
            raise ValueError(f"layer {name!r} is held already")
        self._weights[name] = weight

    @property
    def nbytes(self) -> int:
        """Memory of all codes and scales."""
        return sum(
            w.codes.numel() * w.codes.element_size() + (0 if w.scale is None else w.scale.numel() * 4)
            for w in self._weights.values()
        )

    def stack(self, names: tuple[str, ...]) -> Tensor:
        """The codes of layers one below the other, shape (sum of N, K).

        The layers' own codes become views of the stack, so that no weight is held twice unless a layer
        is a member of two different groups.

        Raises:
            UnknownLayerError: a name this store does not hold.
            ProtocolError: the layers differ in K or dtype, or a name repeats.
        """
        if len(names) == 1:
            return self[names[0]].codes
        if names in self._stacks:
            return self._stacks[names]
        parts = [self[name].codes for name in names]
        if len(set(names)) != len(names):
            raise ProtocolError("a layer stands twice in one group")
        if len({(part.shape[1], part.dtype) for part in parts}) != 1:
            raise ProtocolError(f"layers {', '.join(names)} do not share an input size and a weight format")
        stacked = torch.cat(parts)
        row = 0
        for name, part in zip(names, parts, strict=True):
            self._weights[name] = LayerWeight(stacked[row : row + len(part)], self._weights[name].scale)
            row += len(part)
        self._stacks[names] = stacked
        return stacked

    def manifest(self) -> list[dict[str, Any]]:
        """Names, shapes and formats of the held layers, as plain data."""
        return [
            {
                "name": name,
                "shape": list(weight.codes.shape),
                "dtype": str(weight.codes.dtype).removeprefix("torch."),
            }
            for name, weight in self._weights.items()
        ]
