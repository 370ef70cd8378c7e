"""What a client half makes of codes before the first product: one pass over them, held against what is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from ciphertune.backend import Direction, LinearMap, Preparation
from ciphertune.errors import WeightsError
from ciphertune.weights import DIGEST_ROWS, CodeNorms, CodeSource, LayerInfo, LayerWeight, code_dtype, row_digests

_BLOCK_VALUES = 1 << 22
"""Codes held at once."""

Progress = Callable[[int, int], None]
"""Called with codes read so far, and all of them."""


class HeldCodes:
    """``CodeSource`` of codes in memory, by layer."""

    lasting = False

    def __init__(self, codes: Mapping[str, Tensor]) -> None:
        self._codes = codes

    def read(self, layer: LayerInfo, start: int, stop: int) -> Tensor:
        """See ``CodeSource.read``."""
        return self._codes[layer.name][start:stop]

    def distrust(self, layer: LayerInfo, start: int, stop: int) -> bool:
        """See ``CodeSource.distrust``: there are no others."""
        return False


class Preparer(Protocol):
    """What prepares itself from codes, as ``ClientHalf`` does."""

    def preparation(
        self, forward: LinearMap | None, backward: LinearMap, pieces: Sequence[LinearMap] = ()
    ) -> Preparation | None:
        """See ``ClientHalf.preparation``."""
        ...


def prepare(
    preparers: Sequence[Preparer],
    groups: Sequence[tuple[Sequence[LayerInfo], Mapping[Direction, LinearMap], Sequence[LinearMap]]],
    source: CodeSource,
    progress: Progress | None = None,
) -> int:
    """Stream the codes of those groups that the client half prepares for.

    Codes are read while those before them are worked on; two blocks of a few megabytes are held at a time.

    Args:
        preparers: what prepares itself: the client half, checks of answers.
        groups: the layers of each group, its maps (a table has none of the forward direction), and forward maps of the
            pieces that its products are cut into.
        source: where codes are read.
        progress: told of codes read.

    Returns:
        How many codes were read.

    Raises:
        WeightsError: codes cannot be had, or are not those of the layers. What was prepared of their group is dropped.
        TransportError, ReplyError: as the source.
    """
    wanted = []
    for layers, maps, pieces in groups:
        found = [each.preparation(maps.get("forward"), maps["backward"], pieces) for each in preparers]
        preparations = [each for each in found if each is not None]
        if preparations:
            wanted.append((layers, preparations))
    total = sum(layer.in_features * layer.out_features for layers, _ in wanted for layer in layers)
    done = 0
    with ThreadPoolExecutor(1, "ciphertune-codes") as reader:
        for layers, preparations in wanted:
            for row, codes in _verified(layers, source, reader):
                for each in preparations:
                    each.absorb(row, codes)
                done += codes.numel()
                if progress is not None:
                    progress(done, total)
            for each in preparations:
                each.finish()
    return total


def _verified(
    layers: Sequence[LayerInfo], source: CodeSource, reader: ThreadPoolExecutor
) -> Iterator[tuple[int, Tensor]]:
    """The stacked codes of a group, each block with the row that it starts at, once they are found to be right."""
    parts = [(layer, start, stop) for layer in layers for start, stop in _blocks(layer)]
    below = itertools.accumulate((layer.out_features for layer in layers), initial=0)
    firsts = dict(zip((layer.name for layer in layers), below, strict=False))
    check = _Check(layers[0])
    coming = reader.submit(source.read, *parts[0])
    try:
        for number, (layer, start, stop) in enumerate(parts):
            codes = coming.result()
            while (wrong := check.wrong(codes, start, stop)) is not None:
                if not source.distrust(layer, start, stop):
                    raise WeightsError(wrong)
                codes = source.read(layer, start, stop)
            if number + 1 < len(parts):
                coming = reader.submit(source.read, *parts[number + 1])
            yield firsts[layer.name] + start, codes
            if stop == layer.out_features:
                check.finish()
                if number + 1 < len(parts):
                    check = _Check(parts[number + 1][0])
    finally:
        coming.cancel()


def _blocks(layer: LayerInfo) -> list[tuple[int, int]]:
    """Rows of a layer that are read together."""
    step = max(1, _BLOCK_VALUES // (layer.in_features * DIGEST_ROWS)) * DIGEST_ROWS
    starts = range(0, layer.out_features, step)
    return [(start, min(start + step, layer.out_features)) for start in starts]


class _Check:
    """Holds a layer's codes against its hashes as they come, and its norms at the end."""

    def __init__(self, layer: LayerInfo) -> None:
        self._layer = layer
        self._norms = CodeNorms(layer.in_features, torch.device("cpu"))

    def wrong(self, codes: Tensor, start: int, stop: int) -> str | None:
        """Why codes are not rows start to stop of the layer; None where they are."""
        layer = self._layer
        dtype = code_dtype(layer.weight_bits)
        if codes.dtype != dtype or codes.shape != (stop - start, layer.in_features):
            return (
                f"{layer.name}: expected {dtype} codes of shape {(stop - start, layer.in_features)}, "
                f"got {codes.dtype} {tuple(codes.shape)}"
            )
        scale = None if layer.scale is None else layer.scale[start:stop]
        if row_digests(LayerWeight(codes, scale)) != layer.digests_of(start, stop):
            return f"{layer.name}: rows {start} to {stop} are not those of this model: their hash is another one"
        self._norms.add(codes)
        return None

    def finish(self) -> None:
        """Hold the norms against those that scales are chosen by. Raises ``WeightsError``."""
        layer = self._layer
        if (self._norms.row, self._norms.column) != (layer.max_row_norm, layer.max_column_norm):
            raise WeightsError(
                f"{layer.name}: the norms that are noted for this layer are not those of its weight. "
                "Split the model again"
            )
