"""The weights that a worker serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ciphertune.errors import ProtocolError, UnknownLayerError
from ciphertune.weights import LayerWeight, Shard, code_dtype, describe


class WeightStore:
    """The weights one worker serves. One copy in memory serves every group and session.

    Weights are held in blocks: the layers of a group lie one below the other in one matrix, so that
    the group's codes are a view of it, as is each layer alone.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[tuple[Shard, ...], Tensor]] = []
        # Layer name → (block, first row in the block, shard).
        self._places: dict[str, tuple[int, int, Shard]] = {}

    @classmethod
    def of(cls, weights: Mapping[str, LayerWeight]) -> WeightStore:
        """A store of whole layers, each a block of its own."""
        store = cls()
        for name, weight in weights.items():
            store.add([describe(name, weight).shard()], weight.codes)
        return store

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        """The codes of a layer's rows that are here, (rows, K)."""
        return self.matrix((name,))

    def add(self, shards: Sequence[Shard], codes: Tensor) -> None:
        """Add a block.

        Args:
            shards: what lies in it, from the top.
            codes: (sum of the shards' rows, K), int8, int16 or float32.

        Raises:
            ValueError: a layer is held already, or the sizes do not fit.
        """
        row = 0
        dtype = None if not shards else code_dtype(shards[0].weight_bits)
        places: dict[str, tuple[int, int, Shard]] = {}
        for shard in shards:
            if shard.name in self._places or shard.name in places:
                raise ValueError(f"layer {shard.name!r} is held already")
            if shard.in_features != codes.shape[1] or code_dtype(shard.weight_bits) != dtype:
                raise ValueError(f"layer {shard.name!r} does not share its block's input size and weight format")
            places[shard.name] = (len(self._blocks), row, shard)
            row += shard.rows
        if row != codes.shape[0] or codes.dtype != dtype:
            raise ValueError(f"a block of {row} rows was announced with codes of shape {tuple(codes.shape)}")
        self._blocks.append((tuple(shards), codes))
        self._places.update(places)

    @property
    def nbytes(self) -> int:
        """Memory of all codes."""
        return sum(codes.nbytes for _, codes in self._blocks)

    def matrix(self, names: tuple[str, ...]) -> Tensor:
        """The codes of layers one below the other, (sum of their rows here, K): a view of the block they lie in.

        Raises:
            UnknownLayerError: a name this store does not hold.
            ProtocolError: the layers do not lie one below the other in one block.
        """
        block, start, stop = self.place(names)
        return self._blocks[block][1][start:stop]

    def block(self, number: int) -> Tensor:
        """The codes of a block."""
        return self._blocks[number][1]

    def place(self, names: tuple[str, ...]) -> tuple[int, int, int]:
        """Where ``matrix`` lies: its block, its first row there, and the row behind its last. Raises as ``matrix``."""
        places = [self._place(name) for name in names]
        block, first, _ = places[0]
        row = first
        for place, start, shard in places:
            if (place, start) != (block, row):
                raise ProtocolError(
                    f"layers {', '.join(names)} do not lie one below the other at this worker, so they are no group"
                )
            row += shard.rows
        return block, first, row

    def shard(self, name: str) -> Shard:
        """Which rows of a layer are here. Raises ``UnknownLayerError``."""
        return self._place(name)[2]

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a layer. Raises ``UnknownLayerError``."""
        codes = self._blocks[self._place(name)[0]][1]
        return codes.shape[1] * codes.element_size()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The codes of some rows of a layer, (stop - start, K), counted from the layer's first row.

        Raises:
            UnknownLayerError: a name this store does not hold.
            ProtocolError: rows that are not here.
        """
        block, first, shard = self._place(name)
        if not shard.start <= start < stop <= shard.stop:
            raise ProtocolError(f"this worker holds rows {shard.start} to {shard.stop} of {name!r}")
        return self._blocks[block][1][first + start - shard.start : first + stop - shard.start]

    def manifest(self) -> list[list[dict[str, Any]]]:
        """Return the shards of each block from the top, as plain data."""
        return [[dataclasses.asdict(shard) for shard in shards] for shards, _ in self._blocks]

    def _place(self, name: str) -> tuple[int, int, Shard]:
        try:
            return self._places[name]
        except KeyError:
            raise UnknownLayerError(f"this worker holds no layer named {name!r}") from None
