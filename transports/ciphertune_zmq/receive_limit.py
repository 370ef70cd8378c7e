"""A limit on the memory that incomplete messages of peers may take.

ZeroMQ delivers a message when its last frame has come, so a peer that never sends the last frame could fill the memory.
The kernel counts the bytes received over each connection. Those since its last complete message are in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator

# struct tcp_info of Linux's <linux/tcp.h>: eight bytes, 24 uint32, three uint64, then tcpi_bytes_received.
_OFFSET = 128


_SMALL_BYTES = 1 << 16
_UNLOOKED = 64
"""Small messages in a row that the kernel is not asked after."""


@dataclasses.dataclass
class _Connection:
    """A connection: its peer, bytes received up to its last complete message, messages since the kernel was asked."""

    peer: object
    at_last_message: int
    unlooked: int = 0


class ReceiveLimit:
    """Counts incomplete messages of the connections of one socket, on Linux; elsewhere nothing is counted.

    Descriptors belong to ZeroMQ, which may close one at any time. So each is duplicated for the moment of a look, and a
    connection is identified by its peer's address too.

    Args:
        limit: bytes of incomplete messages of all connections together.

    Attributes:
        limit: as given; it may be changed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._connections: dict[int, _Connection] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def watch(self, descriptor: int) -> None:
        """Count for a new connection, of this file descriptor."""
        self._connections.pop(descriptor, None)
        if not sys.platform.startswith("linux"):
            return
        with contextlib.suppress(OSError), _duplicate(descriptor) as handle:
            self._connections[descriptor] = _Connection(handle.getpeername(), 0)

    def forget(self, descriptor: int) -> None:
        """Stop counting for a connection that has ended."""
        self._connections.pop(descriptor, None)

    def message_complete(self, descriptor: int, nbytes: int = _SMALL_BYTES) -> None:
        """Note that a complete message came over a connection.

        After most small ones the kernel is not asked, which takes longer than reading them. They took at least their
        own bytes, so that no more is taken for complete than is.

        Args:
            descriptor: of the connection.
            nbytes: of the message's frames, at most.
        """
        connection = self._connections.get(descriptor)
        if connection is None:
            return
        if nbytes < _SMALL_BYTES and connection.unlooked < _UNLOOKED:
            connection.unlooked += 1
            connection.at_last_message += nbytes
            return
        connection.unlooked = 0
        connection.at_last_message += self._incomplete(descriptor)

    def enforce(self) -> int:
        """Shut down connections, largest first, until the rest are within the limit; how many were shut down."""
        incomplete = {descriptor: self._incomplete(descriptor) for descriptor in list(self._connections)}
        total = sum(incomplete.values())
        count = 0
        for descriptor in sorted(incomplete, key=incomplete.__getitem__, reverse=True):
            if total <= self.limit:
                break
            total -= incomplete[descriptor]
            count += 1
            self.shut_down(descriptor)
        return count

    def address(self, descriptor: int) -> str:
        """The address that a watched connection comes from, without its port; empty where it is not known."""
        known = self._connections.get(descriptor)
        return str(known.peer[0]) if known is not None and isinstance(known.peer, tuple) else ""

    def shut_down(self, descriptor: int) -> None:
        """End a watched connection."""
        known = self._connections.get(descriptor)
        with contextlib.suppress(OSError), _duplicate(descriptor) as handle:
            if known is not None and handle.getpeername() == known.peer:
                handle.shutdown(socket.SHUT_RDWR)
        self.forget(descriptor)

    def _incomplete(self, descriptor: int) -> int:
        """Bytes received since the last complete message; a connection that has ended is forgotten."""
        connection = self._connections[descriptor]
        try:
            with _duplicate(descriptor) as handle:
                if handle.getpeername() == connection.peer:
                    return _received(handle) - connection.at_last_message
        except OSError:
            pass
        self.forget(descriptor)
        return 0


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    """Make a socket object for a descriptor of ZeroMQ. Raises ``OSError`` if it is not that of a socket."""
    try:
        copy = os.dup(descriptor)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        # Connections have to be ended above all when descriptors have run out.
        handle = socket.socket(fileno=descriptor)
        try:
            yield handle
        finally:
            handle.detach()
        return
    try:
        handle = socket.socket(fileno=copy)
    except OSError:
        # After ZeroMQ has closed it the number may belong to another kind of file.
        os.close(copy)
        raise
    try:
        yield handle
    finally:
        handle.close()


def _received(handle: socket.socket) -> int:
    """Bytes received over a TCP connection since its start; 0 for other kinds of sockets."""
    if handle.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _OFFSET + 8)
    return int(struct.unpack_from("=Q", info, _OFFSET)[0]) if len(info) >= _OFFSET + 8 else 0
