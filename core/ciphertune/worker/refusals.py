"""Refusals as the log tells of them: each peer once a minute, with their number since."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_SECONDS = 60.0
_MOST_PEERS = 1024
_MOST_LINES = 60


class Refusals:
    """Counts what was refused, and logs it rarely enough that no stranger can fill a disk with it.

    Args:
        clock: seconds, as ``time.monotonic``.

    Attributes:
        total: of all peers since the start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._clock = clock
        self._lock = threading.Lock()
        # Peer → when it was logged last, and how often it came since. The one logged last is at the end.
        self._told: collections.OrderedDict[str, tuple[float, int]] = collections.OrderedDict()
        self._lines: collections.deque[float] = collections.deque(maxlen=_MOST_LINES)

    def note(self, peer: str, why: str) -> None:
        """Count a refusal, and log it once in ``_SECONDS`` for each peer, at most ``_MOST_LINES`` for all."""
        now = self._clock()
        with self._lock:
            self.total += 1
            since, count = self._told.get(peer, (now - _SECONDS, 0))
            count += 1
            crowded = len(self._lines) == _MOST_LINES and now - self._lines[0] < _SECONDS
            due = now - since >= _SECONDS and not crowded
            self._told[peer] = (now, 0) if due else (since, count)
            if due:
                self._lines.append(now)
                self._told.move_to_end(peer)
            while len(self._told) > _MOST_PEERS:
                self._told.popitem(last=False)
        if due:
            log.warning("refused", extra={"fields": {"client": peer, "why": why, "times": count}})
