"""The public matrix A of a client and a model: one for all products, never sent."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ciphertune_mlwe.params import PLANES
from ciphertune_mlwe.planes import split_bytes
from ciphertune_mlwe.transforms import DEGREE, Transforms

_DOMAIN = b"ciphertune mlwe public matrix, degree 256, q = 2^32"

KEPT_ROWS = 1 << 14
"""Rows whose transforms are kept; those of longer inputs are made anew for each request."""
_PART_ROWS = 1 << 13
"""Of these, rows whose transforms are held at once."""
_DRAWN_BYTES = 1 << 29
"""Of these, memory for rows that are kept as they were drawn: drawing takes four times as long as transforming."""


class PublicMatrix:
    """Rows a_k of r ring elements by feature index k: SHAKE-128 of domain, seed, model and k.

    Every product uses the first rows. Those of fewer ring elements are prefixes of those of more.

    Args:
        seed: 32 bytes of the client.
        model: SHA-256 over the layers that products are of; empty for a seed that serves no other model.
        transforms: how ring elements are transformed.
    """

    def __init__(self, seed: bytes, model: bytes, transforms: Transforms) -> None:
        self._prefix = hashlib.shake_128(_DOMAIN + seed + model)
        self._transforms = transforms
        self._lock = threading.Lock()
        self._kept: tuple[int, int, Tensor] = (0, 0, torch.empty(0, dtype=torch.float64))
        self._operands: tuple[int, int, Tensor | None] = (0, 0, None)
        self._drawn: dict[int, Tensor] = {}

    def rows(self, start: int, stop: int, rank: int) -> Tensor:
        """Rows start to stop, (rows, rank · degree) int32."""
        size = 4 * rank * DEGREE
        stream = bytearray()
        for row in range(start, stop):
            xof = self._prefix.copy()
            xof.update(row.to_bytes(8, "little"))
            stream += xof.digest(size)
        return torch.from_numpy(np.frombuffer(stream, dtype="<i4").reshape(stop - start, -1))

    def operand(self, start: int, stop: int, rank: int) -> Tensor:
        """Byte planes of rows start to stop, for products with weights.

        They are kept until ``forget_operands`` where they are few.
        """
        if stop > KEPT_ROWS:
            return self._made(start, stop, rank)
        with self._lock:
            count, kept_rank, kept = self._operands
            if kept is None or count < stop or kept_rank < rank:
                kept_rank = max(rank, kept_rank)
                count = min(KEPT_ROWS, max(stop, 2 * count))
                kept = self._made(0, count, kept_rank)
                self._operands = count, kept_rank, kept
        return kept[start:stop, ..., : rank * DEGREE]

    def forget_operands(self) -> None:
        """Free what ``operand`` keeps."""
        with self._lock:
            self._operands = (0, 0, None)

    def parts(self, features: int, rank: int) -> Iterator[tuple[int, int, tuple[int, Tensor]]]:
        """The first rows in parts: where each begins and ends, and what ``transformed`` gives of it.

        A part begins at a multiple of ``LANES``. Inputs as long as a vocabulary would take gigabytes at once.
        """
        if features <= KEPT_ROWS:
            yield 0, features, self.transformed(features, rank)
            return
        for start in range(0, features, _PART_ROWS):
            stop = min(start + _PART_ROWS, features)
            yield start, stop, (rank, self._transforms.of_rows(self._part(start, stop, rank), rank))

    def transformed(self, features: int, rank: int) -> tuple[int, Tensor]:
        """Transforms of the first rows, for ``Transforms.masks``, and the ring elements of a row that they hold.

        They are kept: ``features`` is ``KEPT_ROWS`` at most.
        """
        with self._lock:
            count, kept_rank, kept = self._kept
            if count < features or kept_rank < rank:
                kept_rank = max(rank, kept_rank)
                kept = self._transforms.of_rows(self.rows(0, features, kept_rank), kept_rank)
                self._kept = features, kept_rank, kept
            return kept_rank, kept

    def _part(self, start: int, stop: int, rank: int) -> Tensor:
        """Rows of one part of a long input, kept while there is room."""
        with self._lock:
            found = self._drawn.get(start)
        if found is None or len(found) < stop - start or found.shape[1] < rank * DEGREE:
            found = self.rows(start, stop, rank)
            with self._lock:
                held = sum(part.nbytes for at, part in self._drawn.items() if at != start)
                if held + found.nbytes <= _DRAWN_BYTES:
                    self._drawn[start] = found
        return found[: stop - start, : rank * DEGREE]

    def _made(self, start: int, stop: int, rank: int) -> Tensor:
        rows = self.rows(start, stop, rank).to(self._transforms.device)
        planes = torch.empty(len(rows), PLANES, rows.shape[1], dtype=torch.uint8, device=rows.device)
        split_bytes(rows, planes)
        return planes
