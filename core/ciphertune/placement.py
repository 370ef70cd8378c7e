"""Which worker evaluates which part of which product. Pure functions of what workers say they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from ciphertune.backend import Direction, LinearMap
from ciphertune.errors import UnknownLayerError
from ciphertune.weights import DIGEST_ROWS, LayerInfo, Shard, group_map

Holdings = Sequence[Sequence[Shard]]
"""A worker's manifest: for each block its shards from the top."""


Spread = Literal["layers", "rows", "replicas"]
"""How a model is split over workers: whole layers in runs of about equal size, rows of every layer, or all at each."""


def rows_of_worker(by: Spread, rows: int, worker: int, workers: int, place: float) -> tuple[int, int]:
    """Which rows of a layer a worker gets; the first and the one after the last, the same where it gets none.

    Args:
        by: how the model is split.
        rows: of the layer.
        worker: its number, from 0.
        workers: how many there are.
        place: where the middle of the layer, with those that read the same input, lies in the model, from 0 to 1.

    >>> [rows_of_worker("rows", 192, worker, 2, 0.5) for worker in range(2)]
    [(0, 128), (128, 192)]
    """
    if by == "replicas":
        return 0, rows
    if by == "layers":
        return (0, rows) if int(place * workers) == worker else (0, 0)
    return _cut(rows, worker, workers), _cut(rows, worker + 1, workers)


def _cut(rows: int, part: int, parts: int) -> int:
    """Where a part of a layer's rows begins, at a multiple of ``DIGEST_ROWS``."""
    return rows if part == parts else round(rows * part / parts / DIGEST_ROWS) * DIGEST_ROWS


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of a unit's stacked matrix that come from one layer.

    Attributes:
        layer: its name.
        start, stop: rows of the layer.
        row: where the first of them stands in the unit.
    """

    layer: str
    start: int
    stop: int
    row: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a unit that one worker evaluates as one product.

    Attributes:
        segments: its rows, in the order in which its workers hold them.
        workers: indices of the workers that hold all of it: replicas of each other.
        forward, backward: the maps of this part.
        whole: whether it is all of the unit, in the unit's order.
    """

    segments: tuple[Segment, ...]
    workers: tuple[int, ...]
    forward: LinearMap
    backward: LinearMap
    whole: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in order."""
        return tuple(segment.layer for segment in self.segments)

    def map(self, direction: Direction) -> LinearMap:
        """The map of one direction."""
        return self.forward if direction == "forward" else self.backward


def place(
    units: Sequence[Sequence[LayerInfo]], workers: Mapping[int, Holdings], names: Mapping[int, str]
) -> list[tuple[Piece, ...]]:
    """Cut every unit into pieces that workers hold.

    Args:
        units: the layers of each unit.
        workers: what each worker holds.
        names: of workers, for messages.

    Returns:
        For each unit, pieces that cover each of its rows once. A layer that some worker holds whole is not cut.

    Raises:
        UnknownLayerError: layers, or rows of them, that no worker holds with the right weight; all are listed.
    """
    index = _Index(workers)
    placed = []
    problems: dict[str, str] = {}
    for unit in units:
        segments: list[tuple[Segment, frozenset[int]]] = []
        row = 0
        for layer in unit:
            shards = index.cover(layer)
            if not shards:
                problems[layer.name] = index.why_not(layer, names)
            segments += [(Segment(s.name, s.start, s.stop, row + s.start), holders) for s, holders in shards]
            row += layer.out_features
        placed.append(_pieces(unit, segments, index))
    if problems:
        shown = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UnknownLayerError(
            f"the workers ({', '.join(names.values())}) do not hold {len(problems)} of the layers: {shown}{more}"
        )
    return placed


class _Index:
    """What is held where, by layer."""

    def __init__(self, workers: Mapping[int, Holdings]) -> None:
        self._holders: dict[Shard, set[int]] = {}
        self._by_layer: dict[str, list[Shard]] = {}
        # (worker, layer) → block and row in it.
        self._places: dict[tuple[int, str], tuple[int, int]] = {}
        for worker, blocks in workers.items():
            for number, block in enumerate(blocks):
                row = 0
                for shard in block:
                    if shard not in self._holders:
                        self._by_layer.setdefault(shard.name, []).append(shard)
                    self._holders.setdefault(shard, set()).add(worker)
                    self._places[worker, shard.name] = (number, row)
                    row += shard.rows

    def cover(self, layer: LayerInfo) -> list[tuple[Shard, frozenset[int]]]:
        """Shards of this very weight that together are the layer, from the top; empty where there are none."""
        fitting = [s for s in self._by_layer.get(layer.name, ()) if _fits(s, layer)]
        for shard in fitting:
            if shard.rows == layer.out_features:
                return [(shard, frozenset(self._holders[shard]))]
        # From the last row up, so that no choice leads where nothing goes on.
        below: dict[int, list[tuple[Shard, frozenset[int]]]] = {layer.out_features: []}
        for start in sorted({s.start for s in fitting}, reverse=True):
            options = [s for s in fitting if s.start == start and s.stop in below]
            if options:
                shard = max(options, key=lambda s: (len(self._holders[s]), s.rows))
                below[start] = [(shard, frozenset(self._holders[shard])), *below[shard.stop]]
        return below.get(0, [])

    def why_not(self, layer: LayerInfo, names: Mapping[int, str]) -> str:
        """Why ``cover`` found nothing."""
        shards = self._by_layer.get(layer.name, [])
        if not shards:
            return "no worker has it"
        sizes = {(s.out_features, s.in_features, s.weight_bits) for s in shards}
        mine = (layer.out_features, layer.in_features, layer.weight_bits)
        if mine not in sizes:
            theirs = ", ".join(_size(*size) for size in sorted(sizes, key=str))
            return f"here it is {_size(*mine)}, there {theirs}"
        wrong = {w for s in shards if not _fits(s, layer) for w in self._holders[s]}
        if wrong:
            return f"{', '.join(names[w] for w in sorted(wrong))} holds another weight under this name"
        held = ", ".join(f"{s.start} to {s.stop}" for s in sorted(shards, key=lambda s: s.start))
        return f"only rows {held} of {layer.out_features} are held"

    def follow(self, first: Segment, second: Segment, worker: int) -> bool:
        """Whether a worker holds the second segment right below the first, or the first is its whole shard."""
        block, row = self._places[worker, first.layer]
        return self._places[worker, second.layer] == (block, row + first.stop - first.start)


def _fits(shard: Shard, layer: LayerInfo) -> bool:
    """Whether these are rows of this very weight, cut where digests can tell."""
    aligned = shard.start % DIGEST_ROWS == 0 and shard.stop % DIGEST_ROWS in (0, layer.out_features % DIGEST_ROWS)
    return aligned and shard.stop <= layer.out_features and shard == layer.shard(shard.start, shard.stop)


def _pieces(
    unit: Sequence[LayerInfo], segments: Sequence[tuple[Segment, frozenset[int]]], index: _Index
) -> tuple[Piece, ...]:
    """Segments of the same workers, put together where each of them holds one below the other."""
    runs: list[tuple[list[Segment], frozenset[int]]] = []
    for segment, holders in segments:
        for run, of in runs:
            # A worker holds one shard of a layer, and its shards in the order of the unit.
            if of == holders and all(index.follow(run[-1], segment, worker) for worker in holders):
                run.append(segment)
                break
        else:
            runs.append(([segment], holders))
    layers = {layer.name: layer for layer in unit}
    total = sum(layer.out_features for layer in unit)
    pieces = []
    for run, holders in runs:
        parts = [
            dataclasses.replace(layers[s.layer], out_features=s.stop - s.start, scale=None, row_digests=b"")
            for s in run
        ]
        whole = sum(part.out_features for part in parts) == total
        maps = group_map(parts, "forward"), group_map(parts, "backward")
        pieces.append(Piece(tuple(run), tuple(sorted(holders)), *maps, whole))
    return tuple(pieces)


def _size(rows: int, columns: int, bits: int | None) -> str:
    return f"({rows}, {columns}) in {'float32' if bits is None else f'{bits} bits'}"
