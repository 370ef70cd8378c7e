"""Rules by which a model is split over workers."""

from __future__ import annotations

from typing import Literal

from ciphertune.weights import DIGEST_ROWS

Spread = Literal["layers", "rows", "replicas"]
"""How a model is split over workers: whole layers in runs of about equal size, rows of every layer, or all at each."""


def rows_of_worker(by: Spread, rows: int, worker: int, workers: int, place: float) -> tuple[int, int]:
    """Return which rows of a layer a worker gets: the first, and the one after the last; equal where it gets none.

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
    """Return the first row of a part of a layer, at a multiple of ``DIGEST_ROWS``."""
    return rows if part == parts else round(rows * part / parts / DIGEST_ROWS) * DIGEST_ROWS
