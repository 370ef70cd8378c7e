"""Load of all clients in the form in which each of them may know it: averaged, rounded, and renewed once a second."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

from ciphertune.worker.counters import Load

RENEWAL_SECONDS = 1.0
WINDOW_SECONDS = 10.0


class Totals(NamedTuple):
    """Sums over all clients at one time: seconds of evaluation, products still evaluated included, and bytes."""

    time: float
    evaluate_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


class Disclosure:
    """Figures of all clients that each client may know.

    A client must not learn of another one more than load. So the figures change once in ``RENEWAL_SECONDS``, however
    often they are asked for; ``busy`` and the rates are means over ``WINDOW_SECONDS`` or so, in steps of 1 % and of
    1 MB/s, too coarse to tell single requests; and products are not counted for others, or their number and the rates
    together would tell how large they are. Calls are not synchronized: the caller holds a lock.

    Args:
        evaluators: products evaluated at the same time.
        started: time of the worker's start, on the clock of the totals.
    """

    def __init__(self, evaluators: int, started: float) -> None:
        self._evaluators = evaluators
        self._started = started
        self._samples: collections.deque[Totals] = collections.deque([Totals(started)])
        self._renewed = -math.inf
        self._figures: dict[str, Any] = {}

    def sample(self, totals: Totals) -> None:
        """Keep totals for the means to come."""
        if totals.time - self._samples[-1].time >= RENEWAL_SECONDS:
            self._samples.append(totals)
            # The first is the last that is old enough.
            while len(self._samples) > 1 and self._samples[1].time <= totals.time - WINDOW_SECONDS:
                self._samples.popleft()

    def figures(self, totals: Totals, load: Load) -> dict[str, Any]:
        """Fields of ``WorkerStatus`` that are of all clients.

        Args:
            totals: of now.
            load: of now.
        """
        if totals.time >= self._renewed + RENEWAL_SECONDS:
            self.sample(totals)
            self._renewed, self._figures = totals.time, self._renew(totals, load)
        return self._figures

    def _renew(self, totals: Totals, load: Load) -> dict[str, Any]:
        before = self._samples[0]
        # Right after the start too, or the first request of all could be told from its rate.
        seconds = max(totals.time - before.time, WINDOW_SECONDS)
        busy = (totals.evaluate_seconds - before.evaluate_seconds) / seconds / self._evaluators
        return {
            "uptime_seconds": int(totals.time - self._started),
            "sessions": load.sessions,
            "clients": load.clients,
            "queued": load.queued,
            "under_way": load.under_way,
            "busy": min(1.0, round(busy, 2)),
            "bytes_in_per_second": _rough((totals.bytes_in - before.bytes_in) / seconds),
            "bytes_out_per_second": _rough((totals.bytes_out - before.bytes_out) / seconds),
        }


def _rough(rate: float) -> int:
    """Bytes a second in whole megabytes, to two digits.

    >>> _rough(1234567890.0), _rough(1_700_000.0), _rough(400_000.0)
    (1200000000, 2000000, 0)
    """
    return int(float(f"{round(rate / 1e6):.2g}") * 1e6)
