"""A bound on what peers can make this process hold before a message is complete.

ZeroMQ delivers a message only when its last frame is there, so a peer that never sends it could fill the memory with
frames that nobody gets to see. The kernel counts what came over each connection: what came since its last complete
message is what is being held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import sys
from collections.abc import Iterator

# struct tcp_info of Linux's <linux/tcp.h>: eight bytes, 24 uint32, three uint64, then tcpi_bytes_received.
_OFFSET = 128


@dataclasses.dataclass
class _Connection:
    peer: object
    at_last_message: int


class ReceiveLimit:
    """Watches the connections of one socket.

    Descriptors are ZeroMQ's own, which closes them when it likes, so they are looked at only for a moment, and a
    connection is known again by its peer's address.

    Args:
        limit: bytes of unfinished messages of all connections together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: dict[int, _Connection] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def opened(self, descriptor: int) -> None:
        """A connection with this file descriptor is there."""
        self._connections.pop(descriptor, None)
        if not sys.platform.startswith("linux"):
            return
        with contextlib.suppress(OSError), _borrowed(descriptor) as handle:
            self._connections[descriptor] = _Connection(handle.getpeername(), 0)

    def closed(self, descriptor: int) -> None:
        """It is gone."""
        self._connections.pop(descriptor, None)

    def delivered(self, descriptor: int) -> None:
        """A complete message came over it."""
        if descriptor in self._connections:
            self._connections[descriptor].at_last_message += self._held(descriptor)

    def enforce(self) -> int:
        """Cut the connections that hold the most until the rest is within the limit; how many were cut."""
        held = {descriptor: self._held(descriptor) for descriptor in list(self._connections)}
        total = sum(held.values())
        cut = 0
        for descriptor in sorted(held, key=held.__getitem__, reverse=True):
            if total <= self._limit:
                break
            total -= held[descriptor]
            cut += 1
            with contextlib.suppress(OSError), _borrowed(descriptor) as handle:
                if handle.getpeername() == self._connections[descriptor].peer:
                    handle.shutdown(socket.SHUT_RDWR)
            self.closed(descriptor)
        return cut

    def _held(self, descriptor: int) -> int:
        """Bytes that came since its last complete message; a connection that is gone is forgotten."""
        connection = self._connections[descriptor]
        try:
            with _borrowed(descriptor) as handle:
                if handle.getpeername() == connection.peer:
                    return _received(handle) - connection.at_last_message
        except OSError:
            pass
        self.closed(descriptor)
        return 0


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object for a descriptor of someone else's. Raises ``OSError`` where it is none."""
    copy = os.dup(descriptor)
    try:
        handle = socket.socket(fileno=copy)
    except OSError:
        # Closed meanwhile, its number may be that of something that is no socket.
        os.close(copy)
        raise
    try:
        yield handle
    finally:
        handle.close()


def _received(handle: socket.socket) -> int:
    """Bytes that ever came over a TCP connection, 0 for other kinds."""
    if handle.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _OFFSET + 8)
    return int(struct.unpack_from("=Q", info, _OFFSET)[0]) if len(info) >= _OFFSET + 8 else 0
