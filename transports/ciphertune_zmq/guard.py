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

# struct tcp_info of Linux's <linux/tcp.h>: eight bytes, 24 uint32, three uint64, then tcpi_bytes_received.
_OFFSET = 128


@dataclasses.dataclass
class _Connection:
    handle: socket.socket
    at_last_message: int


class Backlog:
    """Watches the connections of one socket.

    Args:
        limit: bytes of unfinished messages of all connections together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: dict[int, _Connection] = {}

    def opened(self, descriptor: int) -> None:
        """A connection with this file descriptor is there."""
        self.closed(descriptor)
        if not sys.platform.startswith("linux"):
            return
        try:
            # A copy of its own, since the descriptor's number is used again as soon as it is closed.
            handle = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            return
        self._connections[descriptor] = _Connection(handle, 0)

    def closed(self, descriptor: int) -> None:
        """It is gone."""
        connection = self._connections.pop(descriptor, None)
        if connection is not None:
            connection.handle.close()

    def delivered(self, descriptor: int) -> None:
        """A complete message came over it."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            connection.at_last_message = _received(connection.handle)

    def enforce(self) -> int:
        """Cut the connections that hold the most until the rest is within the limit; how many were cut."""
        held = {
            descriptor: _received(connection.handle) - connection.at_last_message
            for descriptor, connection in self._connections.items()
        }
        total = sum(held.values())
        cut = 0
        for descriptor in sorted(held, key=held.__getitem__, reverse=True):
            if total <= self._limit:
                break
            total -= held[descriptor]
            cut += 1
            with contextlib.suppress(OSError):
                self._connections[descriptor].handle.shutdown(socket.SHUT_RDWR)
            self.closed(descriptor)
        return cut

    def close(self) -> None:
        """Let go of all."""
        for descriptor in list(self._connections):
            self.closed(descriptor)


def _received(handle: socket.socket) -> int:
    """Bytes that ever came over a TCP connection, 0 for other kinds."""
    try:
        info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _OFFSET + 8)
    except OSError:
        return 0
    return struct.unpack_from("=Q", info, _OFFSET)[0] if len(info) >= _OFFSET + 8 else 0
