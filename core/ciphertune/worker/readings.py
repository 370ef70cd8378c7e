"""How much of a worker's weights each client has read."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from ciphertune.errors import QuotaError

_HOUR = 3600.0
_MOST_PEERS = 1024


class Readings:
    """Bytes of weights that clients read within the last hour.

    Args:
        clock: seconds, as ``time.monotonic``.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Peer → when its hour began, and what it read since; the one that read last at the end.
        self._read: collections.OrderedDict[str, tuple[float, int]] = collections.OrderedDict()

    def count(self, peer: str, nbytes: int, most: int) -> None:
        """Count what a client reads, of ``most`` bytes within an hour.

        Raises:
            QuotaError: it is too much; then nothing was counted.
        """
        now = self._clock()
        with self._lock:
            since, read = self._read.pop(peer, (now, 0))
            if now - since >= _HOUR:
                since, read = now, 0
            refused = read + nbytes > most
            self._read[peer] = (since, read if refused else read + nbytes)
            while len(self._read) > _MOST_PEERS:
                self._read.popitem(last=False)
        if refused:
            raise QuotaError(
                f"this client has read {read / 1e6:.0f} MB of weights, of {most / 1e6:.0f} MB an hour; more may "
                f"be read in {(since + _HOUR - now) / 60:.0f} minutes"
            )
