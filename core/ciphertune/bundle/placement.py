"""Placement of a model on workers: parts of its layers, rows of every layer, replicas, or several of these."""

from __future__ import annotations

import dataclasses
import re

from ciphertune.errors import ConfigError
from ciphertune.weights import DIGEST_ROWS

_FACTOR = re.compile(r"(layers|rows|replicas)(?::([1-9][0-9]{0,5}))?")


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model is placed on workers.

    Attributes:
        layers: parts into which the model is cut between layers, of about equal size.
        rows: workers that hold rows of each layer of a part, and evaluate its products together.
        replicas: how often all of this is there.

    >>> Placement(layers=2, rows=4).workers, str(Placement(layers=2, rows=4))
    (8, 'layers:2,rows:4')
    """

    layers: int = 1
    rows: int = 1
    replicas: int = 1

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.layers * self.rows * self.replicas

    @property
    def parts(self) -> int:
        """Number of workers that hold different weights."""
        return self.layers * self.rows

    def __str__(self) -> str:
        factors = [(name, getattr(self, name)) for name in ("layers", "rows", "replicas")]
        return ",".join(f"{name}:{count}" for name, count in factors if count > 1) or "rows:1"

    @classmethod
    def read(cls, text: str, workers: int | None = None) -> Placement:
        """Read a placement.

        Args:
            text: ``layers``, ``rows`` or ``replicas`` for all workers, or numbers of them, whose product is the number
                of workers: ``layers:2,rows:4``.
            workers: how many there are; None where the text says it.

        Raises:
            ConfigError: it is none of these, or of another number of workers.

        >>> Placement.read("rows", 4), Placement.read("layers:2,rows:4")
        (Placement(layers=1, rows=4, replicas=1), Placement(layers=2, rows=4, replicas=1))
        """
        counts: dict[str, int] = {}
        for part in text.replace(" ", "").split(","):
            found = _FACTOR.fullmatch(part)
            if found is None or found[1] in counts or (found[2] is None and "," in text):
                raise ConfigError(
                    f"cannot read the placement {text!r}: write layers, rows or replicas for all workers, or numbers "
                    "of them, as in layers:2,rows:4"
                )
            if found[2] is None and workers is None:
                raise ConfigError(f"the placement {text!r} does not say how many workers there are: write {part}:4")
            counts[found[1]] = int(found[2] or workers or 1)
        placement = cls(**counts)
        if workers is not None and placement.workers != workers:
            raise ConfigError(f"the placement {text!r} is for {placement.workers} workers, not {workers}")
        return placement

    def rows_of(self, worker: int, rows: int, place: float) -> tuple[int, int]:
        """Return which rows of a layer a worker gets: the first, and the one after the last; equal where it gets none.

        Args:
            worker: its number, from 0. Replicas follow each other: the first ``parts`` workers hold everything once.
            rows: of the layer.
            place: where the middle of the layer, with those that read the same input, lies in the model, from 0 to 1.

        >>> [Placement(rows=2).rows_of(worker, 192, 0.5) for worker in range(2)]
        [(0, 128), (128, 192)]
        """
        layers, part = divmod(worker % self.parts, self.rows)
        if int(place * self.layers) != layers:
            return 0, 0
        return cut_rows(rows, part, self.rows)


def cut_rows(rows: int, part: int, parts: int) -> tuple[int, int]:
    """Return where a part of a layer's rows begins and ends, at multiples of ``DIGEST_ROWS`` or the layer's end."""
    first, last = (
        rows if i == parts else round(rows * i / parts / DIGEST_ROWS) * DIGEST_ROWS for i in (part, part + 1)
    )
    return first, last


def placements(workers: int) -> list[Placement]:
    """Placements worth comparing for a number of workers: rows within parts of the layers, and replicas of rows."""
    cuts = [rows for rows in range(1, workers + 1) if workers % rows == 0]
    pipelines = [Placement(layers=workers // rows, rows=rows) for rows in cuts]
    return pipelines + [Placement(rows=rows, replicas=workers // rows) for rows in cuts if rows < workers]


def halved(workers: int) -> list[int]:
    """A number of workers and its halves, down to one, the fewest first.

    >>> halved(12)
    [1, 3, 6, 12]
    """
    return sorted({workers >> i for i in range(workers.bit_length())})
