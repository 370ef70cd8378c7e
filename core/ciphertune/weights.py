"""Quantized weights, and the descriptions of them that both ends share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ciphertune.backend import Direction, LinearMap, WeightBits
from ciphertune.errors import ProtocolError, UnsupportedLayerError

_CODE_DTYPES = {8: torch.int8, 16: torch.int16}
# 16-bit codes stop where two balanced base-256 digits do: 127 · 257.
_LARGEST_CODE = {8: 127, 16: 32639}

DIGEST_ROWS = 64
"""Rows that one digest covers; workers hold layers whole or cut at multiples of it."""
LARGEST_READING = 1 << 24
"""Bytes of codes in one reply at most, unless ``DIGEST_ROWS`` rows are more."""
_CHUNK_VALUES = 1 << 22
"""Values worked on at once, so that quantizing a large layer takes little memory beside it."""


MOST_CHANNELS = 8
"""Channels of a product that a client multiplies itself, at most."""


@dataclasses.dataclass(frozen=True)
class KeptChannels:
    """Channels of one layer that the client multiplies itself, because their values lie far above the others'.

    The worker has the whole weight and gets requests of full length, in which these channels are zeros.

    Attributes:
        inputs: (A,) int64, rising: of the input, in forward products. The same for layers that share their input.
        columns: the weight's columns for them, (A, N) in 16 bits, one scale each.
        outputs: (B,) int64, rising: of the output's gradient, in backward products.
        rows: the weight's rows for them, (B, K) in 16 bits, one scale each.
    """

    inputs: Tensor
    columns: LayerWeight
    outputs: Tensor
    rows: LayerWeight

    @functools.cached_property
    def column_values(self) -> Tensor:
        """What ``columns`` stands for, (A, N) float32."""
        with torch.inference_mode(False):
            return self.columns.dequantize()

    @functools.cached_property
    def sent_inputs(self) -> Tensor:
        """(K,) float32: zeros for ``inputs`` and ones for all other channels."""
        with torch.inference_mode(False):
            factors = torch.ones(self.rows.codes.shape[1], dtype=torch.float32, device=self.inputs.device)
            return factors.index_fill_(0, self.inputs, 0.0)


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """A client's view of one outsourced layer: everything but the weight.

    Attributes:
        name: dotted path of the layer in the model.
        in_features, out_features: K and N of ``y = x Wᵀ``, W of shape (N, K).
        weight_bits: 8 or 16 for integer codes, None for float32.
        scale: (N,) float32, ``W = diag(scale) · codes``; None where the weight is float32.
        max_row_norm, max_column_norm: largest Euclidean norm of a row and of a column of the codes.
        row_digests: SHA-256 of codes and scales of every ``DIGEST_ROWS`` rows, one after the other.
        kept: channels that the client multiplies itself, None for none.
    """

    name: str
    in_features: int
    out_features: int
    weight_bits: WeightBits | None
    scale: Tensor | None = dataclasses.field(repr=False)
    max_row_norm: float
    max_column_norm: float
    row_digests: bytes = dataclasses.field(repr=False)
    kept: KeptChannels | None = dataclasses.field(default=None, repr=False)

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """SHA-256, hexadecimal, that identifies rows start to stop, both at multiples of ``DIGEST_ROWS`` or the end.

        A worker that holds these rows of this weight announces the same one.
        """
        return hashlib.sha256(self.digests_of(start, self.out_features if stop is None else stop)).hexdigest()

    def digests_of(self, start: int, stop: int) -> bytes:
        """The part of ``row_digests`` for rows start to stop, both at multiples of ``DIGEST_ROWS`` or the end."""
        size = hashlib.sha256().digest_size
        return self.row_digests[start // DIGEST_ROWS * size : -(-stop // DIGEST_ROWS) * size]

    def describes(self, weight: Tensor) -> bool:
        """Whether this is known of a weight, (N, K) of any floating dtype, rounded as that of the layer was."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            return False
        try:
            return self.row_digests == row_digests(quantize(weight, self.weight_bits))
        except UnsupportedLayerError:  # it is not finite
            return False

    def shard(self, start: int = 0, stop: int | None = None) -> Shard:
        """Rows start to stop of this layer, as a worker announces them."""
        last = self.out_features if stop is None else stop
        return Shard(
            self.name, start, last, self.in_features, self.out_features, self.weight_bits, self.digest(start, last)
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows of one layer that a worker holds: all of them, unless the layer is cut.

    Attributes:
        name: of the layer.
        start, stop: rows of the layer's weight.
        in_features, out_features, weight_bits: of the whole layer.
        digest: as ``LayerInfo.digest`` of these rows.
    """

    name: str
    start: int
    stop: int
    in_features: int
    out_features: int
    weight_bits: WeightBits | None
    digest: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @classmethod
    def read(cls, row: Any) -> Shard:
        """Read a shard from plain data that came from a peer or a file. Raises ``ProtocolError``."""
        if not isinstance(row, Mapping):
            raise ProtocolError("a manifest row is not a map")
        name, digest, bits = row.get("name"), row.get("digest"), row.get("weight_bits")
        numbers: list[Any] = [row.get(key) for key in ("start", "stop", "in_features", "out_features")]
        if not isinstance(name, str) or not isinstance(digest, str) or bits not in (8, 16, None):
            raise ProtocolError("a manifest row lacks its name, digest or weight format")
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 31 for n in numbers):
            raise ProtocolError(f"the manifest row of {name!r} has malformed sizes")
        start, stop, k, n = numbers
        if not (start < stop <= n and k > 0):
            raise ProtocolError(f"the manifest row of {name!r} has rows {start} to {stop} of {n}")
        return cls(name, start, stop, k, n, bits, digest)


class CodeSource(Protocol):
    """Where a client reads codes: its own model, a worker, a folder. It is not trusted.

    Attributes:
        lasting: whether they can be read again at any time, and no weight is held in memory for that.
    """

    lasting: bool

    def read(self, layer: LayerInfo, start: int, stop: int) -> Tensor:
        """The codes of rows start to stop of a layer, (stop - start, K), int8 or int16, on any device.

        Both ends stand at multiples of ``DIGEST_ROWS`` or at the layer's end.
        """
        ...

    def distrust(self, layer: LayerInfo, start: int, stop: int) -> bool:
        """Take notice that these rows were not those of the layer; whether they can be had from elsewhere."""
        ...


@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """A quantized weight: codes of shape (N, K) and, for integer codes, one scale per output channel."""

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
    weight = weight.detach()
    rows = weight.shape[0]
    codes = torch.empty(weight.shape, dtype=code_dtype(bits), device=weight.device)
    scale = None if bits is None else torch.empty(rows, dtype=torch.float32, device=weight.device)
    for part in _chunks(weight):
        values = weight[part].to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise UnsupportedLayerError("the weight holds NaN or infinity")
        if bits is None or scale is None:
            codes[part] = values
            continue
        top = float(_LARGEST_CODE[bits])
        unit = values.abs().amax(dim=1) / top
        # An all-zero row, or one so small that its scale underflows, quantizes to zeros; a scale of zero takes the
        # noise of such an output with it.
        scale[part] = unit
        unit = torch.where(unit > 0, unit, torch.full_like(unit, torch.inf))
        codes[part] = torch.div(values, unit[:, None]).round_().clamp_(-top, top).to(codes.dtype)
    return LayerWeight(codes, scale)


def quantize_layer(name: str, weight: Tensor, bits: WeightBits | None) -> LayerWeight:
    """``quantize``, with the layer's name in the error. Raises ``UnsupportedLayerError``."""
    try:
        return quantize(weight, bits)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"{name} cannot be outsourced: {error}") from error


class CodeNorms:
    """The largest norms of a layer's codes, from blocks of rows. Those of integer codes do not depend on the blocks.

    Args:
        features: K.
        device: of the codes.

    Attributes:
        row: largest Euclidean norm of a row so far.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.row = 0.0
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, codes: Tensor) -> None:
        """Take some rows, (rows, K)."""
        squares = codes.to(self._squares.device, torch.float64).square_()
        self.row = max(self.row, math.sqrt(float(squares.sum(dim=1).max())))
        self._squares += squares.sum(dim=0)

    @property
    def column(self) -> float:
        """Largest Euclidean norm of a column so far."""
        return math.sqrt(float(self._squares.max()))


def describe(name: str, weight: LayerWeight) -> LayerInfo:
    """The client's view of a weight."""
    codes = weight.codes
    n, k = codes.shape
    bits: WeightBits | None = {torch.int8: 8, torch.int16: 16}.get(codes.dtype)  # type: ignore[assignment]
    norms = CodeNorms(k, codes.device)
    for part in _chunks(codes):
        norms.add(codes[part])
    return LayerInfo(
        name=name,
        in_features=k,
        out_features=n,
        weight_bits=bits,
        scale=weight.scale,
        max_row_norm=norms.row,
        max_column_norm=norms.column,
        row_digests=row_digests(weight),
    )


def row_digests(weight: LayerWeight) -> bytes:
    """SHA-256 of codes and scales of every ``DIGEST_ROWS`` rows, one after the other."""
    digests = []
    for start in range(0, len(weight.codes), DIGEST_ROWS):
        part = slice(start, start + DIGEST_ROWS)
        digest = hashlib.sha256(_raw(weight.codes[part]))
        if weight.scale is not None:
            digest.update(_raw(weight.scale[part]))
        digests.append(digest.digest())
    return b"".join(digests)


def _chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def model_digest(layers: Sequence[LayerInfo]) -> bytes:
    """SHA-256 over names, sizes and row digests of a model's outsourced layers, in their order."""
    digest = hashlib.sha256()
    for layer in layers:
        row = [layer.name, layer.out_features, layer.in_features, layer.weight_bits]
        digest.update(json.dumps(row).encode() + hashlib.sha256(layer.row_digests).digest())
    return digest.digest()


def group_map(layers: Sequence[LayerInfo], direction: Direction) -> LinearMap:
    """The map of layers that share one input, their outputs concatenated (forward) or summed (backward)."""
    label = f"{' + '.join(layer.name for layer in layers)} ({direction})"
    features = layers[0].in_features
    outputs = sum(layer.out_features for layer in layers)
    identity = hashlib.sha256(direction.encode())
    for layer in layers:
        identity.update(f"|{layer.out_features}|{layer.in_features}|{layer.weight_bits}|".encode())
        identity.update(layer.row_digests)
    if direction == "forward":
        norm = max(layer.max_row_norm for layer in layers)
        return LinearMap(label, "forward", features, outputs, norm, identity.hexdigest())
    # A column of the stacked matrix is the layers' columns one after the other.
    norm = math.sqrt(sum(layer.max_column_norm**2 for layer in layers))
    return LinearMap(label, "backward", outputs, features, norm, identity.hexdigest())


def lookup_map(table: LayerInfo) -> LinearMap:
    """The map of lookups in a table of N rows: backward products with inputs that name one row each.

    They have an identity of their own: what is prepared for other backward products of the same weight is for inputs of
    any kind.
    """
    whole = group_map([table], "backward")
    return dataclasses.replace(
        whole,
        label=f"{table.name} (lookup)",
        identity=hashlib.sha256(b"lookup" + whole.identity.encode()).hexdigest(),
        peak=0.0 if table.weight_bits is None else _LARGEST_CODE[table.weight_bits],
    )


def code_dtype(bits: WeightBits | None) -> torch.dtype:
    """The dtype of codes of so many bits; float32 for None."""
    return torch.float32 if bits is None else _CODE_DTYPES[bits]


def holdings_digest(manifest: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """SHA-256 of what a worker holds: after a reconnection it tells whether the worker is another one."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(blocks: Any) -> list[list[Shard]]:
    """A worker's manifest from plain data. Raises ``ProtocolError``."""
    if not isinstance(blocks, list) or not all(isinstance(block, list) for block in blocks):
        raise ProtocolError("a manifest is not a list of blocks")
    read = [[Shard.read(row) for row in block] for block in blocks]
    names = [shard.name for block in read for shard in block]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ProtocolError(f"a manifest lists the layer {twice!r} twice")
    return read
