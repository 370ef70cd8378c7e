"""A request handler for tests of transports, in place of a worker's service."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

from ciphertune.protocol import Frame, Limits, error_message, pack
from ciphertune.transport import Reply


class EchoHandler:
    """A request handler whose replies are the requests themselves, at once or when ``answer`` is called.

    Attributes:
        hold: whether to keep requests until ``answer``.
        kept: requests that were not answered yet, and the functions that reply to them.
        peers: their senders, in order of arrival.
        connections: those that requests came over, in order of arrival, as far as the transport names them.
        gone: connections that have ended, with their clients.
        dismissed: clients that may come no more.
        refusals: who was refused, and why.
        released: number of replies that the listener has released.
        largest: bytes of the largest request, refused ones included.
    """

    limits = Limits(buffer_bytes=64 << 20, total_bytes=64 << 20)

    def __init__(self) -> None:
        self.hold = False
        self.kept: list[tuple[list[Frame], Reply]] = []
        self.peers: list[str] = []
        self.connections: list[Hashable] = []
        self.gone: list[tuple[str, Hashable]] = []
        self.dismissed: list[str] = []
        self.refusals: list[tuple[str, str]] = []
        self.released = 0
        self.largest = 0
        self._lock = threading.Lock()

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None] | None:
        """See ``RequestHandler.reserve``: there is always room."""
        return lambda: None

    def submit(
        self, frames: Sequence[Frame], peer: str, reply: Reply, connection: Hashable = None, *, idle: bool = False
    ) -> None:
        """See ``RequestHandler.submit``."""
        size = sum(len(memoryview(frame).cast("B")) for frame in frames)
        with self._lock:
            self.largest = max(self.largest, size)
            self.peers.append(peer)
            self.connections.append(connection)
            if self.hold:
                self.kept.append((list(frames), reply))
                return
        refused = not frames or size > self.limits.total_bytes + self.limits.header_bytes
        answer = pack(error_message("protocol", "no message, or too large a one")) if refused else list(frames)
        reply(answer, self._release)

    def left(self, peer: str, connection: Hashable) -> None:
        """See ``RequestHandler.left``."""
        self.gone.append((peer, connection))

    def dismiss(self, peer: str) -> None:
        """See ``RequestHandler.dismiss``."""
        self.dismissed.append(peer)

    def refused(self, peer: str, why: str) -> None:
        """See ``RequestHandler.refused``."""
        self.refusals.append((peer, why))

    def answer(self, backwards: bool = False) -> None:
        """Reply to the requests that were kept, the last one first if ``backwards``."""
        with self._lock:
            kept, self.kept = self.kept, []
        for frames, reply in reversed(kept) if backwards else kept:
            reply(frames, self._release)

    def _release(self) -> None:
        with self._lock:
            self.released += 1
