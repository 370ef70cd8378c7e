"""Placement: which workers evaluate which part of a product. Pure functions of what workers say they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ciphertune.backend import DIRECTIONS, Direction, LinearMap
from ciphertune.errors import UnknownLayerError
from ciphertune.weights import DIGEST_ROWS, LayerInfo, Shard, group_map

Holdings = Sequence[Sequence[Shard]]
"""A worker's manifest: for each block its shards from the top."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a group that one worker evaluates as one product.

    Attributes:
        shards: its rows, in the order in which its workers hold them.
        workers: indices of the workers that hold all of it: replicas of each other.
        forward, backward: the maps of this part; their ``rows`` say where each shard stands in the group's stacked
            matrix.
        whole: whether it is all of the group, in the group's order.
    """

    shards: tuple[Shard, ...]
    workers: tuple[int, ...]
    forward: LinearMap
    backward: LinearMap
    whole: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in order."""
        return tuple(shard.name for shard in self.shards)

    def map(self, direction: Direction) -> LinearMap:
        """The map of one direction."""
        return self.forward if direction == "forward" else self.backward


def place(
    groups: Sequence[Sequence[LayerInfo]], workers: Mapping[int, Holdings], names: Mapping[int, str]
) -> list[tuple[Piece, ...]]:
    """Cut every group into pieces that workers hold.

    Args:
        groups: the layers of each group.
        workers: what each worker holds.
        names: of workers, for messages.

    Returns:
        For each group, pieces that cover each of its rows once. A layer that some worker holds whole is not cut.

    Raises:
        UnknownLayerError: layers, or rows of them, that no worker holds with the right weight; all are listed.
    """
    index = _Index(workers)
    placed = []
    problems: dict[str, str] = {}
    for group in groups:
        parts: list[_Part] = []
        row = 0
        for layer in group:
            shards = index.cover(layer)
            if not shards:
                problems[layer.name] = index.why_not(layer, names)
            parts += [_Part(shard, slice(row + shard.start, row + shard.stop), held) for shard, held in shards]
            row += layer.out_features
        placed.append(_pieces(group, parts, index))
    if problems:
        raise UnknownLayerError(_without(problems, list(names.values())))
    return placed


def fitting(groups: Sequence[Sequence[LayerInfo]], holdings: Holdings) -> int:
    """Number of the shards that a worker holds which are rows of these very layers."""
    layers = {layer.name: layer for group in groups for layer in group}
    shards = (shard for block in holdings for shard in block)
    return sum(shard.name in layers and _fits(shard, layers[shard.name]) for shard in shards)


def _without(problems: Mapping[str, str], names: Sequence[str]) -> str:
    """Why some layers are held by no worker: each cause once, with the first of the layers that it is the cause of."""
    causes: dict[str, list[str]] = {}
    for name, why in problems.items():
        causes.setdefault(why, []).append(name)
    shown = "; ".join(
        f"{of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {why}" for why, of in list(causes.items())[:3]
    )
    more = f"; and {len(causes) - 3} causes more" if len(causes) > 3 else ""
    who = f"the workers ({', '.join(names)}) do not" if names else "no worker that answers does"
    return f"{who} hold {len(problems)} of the layers: {shown}{more}"


class _Part(NamedTuple):
    """A shard, where it stands in its group, and the workers that hold it."""

    shard: Shard
    rows: slice
    workers: frozenset[int]


class _Index:
    """Shards by layer, with the workers that hold them and their places there."""

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
        """Find shards of this very weight that together are the layer, from the top; empty where there are none."""
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

    def follow(self, first: Shard, second: Shard, worker: int) -> bool:
        """Whether a worker holds the second shard right below the first."""
        block, row = self._places[worker, first.name]
        return self._places[worker, second.name] == (block, row + first.rows)


def _fits(shard: Shard, layer: LayerInfo) -> bool:
    """Whether these are rows of this very weight, cut where digests can tell."""
    aligned = shard.start % DIGEST_ROWS == 0 and shard.stop % DIGEST_ROWS in (0, layer.out_features % DIGEST_ROWS)
    return aligned and shard.stop <= layer.out_features and shard == layer.shard(shard.start, shard.stop)


def _pieces(group: Sequence[LayerInfo], parts: Sequence[_Part], index: _Index) -> tuple[Piece, ...]:
    """Parts of the same workers, put together where each of them holds one below the other."""
    runs: list[list[_Part]] = []
    for part in parts:
        for run in runs:
            # A worker holds one shard of a layer, and its shards in the order of the group.
            last = run[-1]
            if last.workers == part.workers and all(index.follow(last.shard, part.shard, w) for w in part.workers):
                run.append(part)
                break
        else:
            runs.append([part])
    layers = {layer.name: layer for layer in group}
    total = sum(layer.out_features for layer in group)
    pieces = []
    for run in runs:
        shards = tuple(part.shard for part in run)
        cut = [dataclasses.replace(layers[s.name], out_features=s.rows, scale=None, row_digests=b"") for s in shards]
        whole = sum(shard.rows for shard in shards) == total
        places = tuple((part.rows.start, part.rows.stop) for part in run)
        forward, backward = (
            dataclasses.replace(group_map(cut, direction), identity="", rows=places) for direction in DIRECTIONS
        )
        workers = tuple(sorted(run[0].workers))
        pieces.append(Piece(shards, workers, forward, backward, whole))
    return tuple(pieces)


def _size(rows: int, columns: int, bits: int | None) -> str:
    return f"({rows}, {columns}) in {'float32' if bits is None else f'{bits} bits'}"
