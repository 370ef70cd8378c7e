"""Messages between a process and its relay over a socket pair: a msgpack map, then raw frames."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from ciphertune.errors import ProtocolError
from ciphertune.protocol import DEFAULT_LIMITS, Frame

_PREFIX = struct.Struct("<I")
_BUFFER = 4 << 20


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets with large buffers."""
    ends = socket.socketpair()
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    return ends


class Channel:
    """One end of the socket pair. Several threads may send, and one may receive.

    Sizes are checked before memory is allocated for them: a relay speaks to machines that are not trusted.

    Args:
        end: one of ``socket_pair``.
        most: bytes of frames that may come with a head; None for as many as a message may have. Longer ones are passed
            over, and their head comes with an error.
    """

    def __init__(self, end: socket.socket, most: Callable[[Mapping[str, Any]], int | None] = lambda _: None) -> None:
        self._socket = end
        self._most = most
        self._sending = threading.Lock()

    def send(self, head: Mapping[str, Any], frames: Sequence[Frame] = ()) -> None:
        """Send a message. Raises ``OSError`` if the other end is gone."""
        views = [memoryview(frame).cast("B") for frame in frames]
        packed = msgpack.packb({**head, "sizes": [len(view) for view in views]})
        with self._sending:
            self._socket.sendall(_PREFIX.pack(len(packed)) + packed)
            for view in views:
                self._socket.sendall(view)

    def receive(self) -> tuple[dict[str, Any], list[Frame]] | None:
        """Wait for the next message; None once the other end is gone.

        Raises:
            ProtocolError: it is malformed, or larger than the protocol allows.
        """
        try:
            prefix = self._read(_PREFIX.size)
            if prefix is None:
                return None
            head = self._head(_PREFIX.unpack(prefix)[0])
            if head is None:
                return None
            frames: list[Frame] = []
            sizes = head.pop("sizes")
            most = self._most(head)
            if most is not None and sum(sizes) > most:
                if not self._pass_over(sum(sizes)):
                    return None
                return {**head, "error": "it is longer than the reply to its request can be", "kind": "ReplyError"}, []
            for size in sizes:
                frame = self._read(size)
                if frame is None:
                    return None
                frames.append(frame)
        except OSError:
            return None
        return head, frames

    def close(self) -> None:
        """Close this end; ``receive`` returns None at both."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _head(self, size: int) -> dict[str, Any] | None:
        limits = DEFAULT_LIMITS
        if size > limits.header_bytes:
            raise ProtocolError(f"the relay sent a head of {size} bytes")
        raw = self._read(size)
        if raw is None:
            return None
        try:
            head = msgpack.unpackb(bytes(raw), max_array_len=limits.header_items, max_map_len=limits.header_items)
            sizes = head["sizes"]
            fits = len(sizes) <= limits.buffers + 1 and all(type(n) is int and n >= 0 for n in sizes)
        except Exception as error:
            raise ProtocolError(f"the relay sent a malformed head: {type(error).__name__}") from error
        most = limits.total_bytes + limits.header_bytes
        if not fits or sum(sizes) > most or max(sizes, default=0) > limits.buffer_bytes:
            raise ProtocolError("the relay announced more than a message may hold")
        return dict(head)

    def _pass_over(self, size: int) -> bool:
        """Read ``size`` bytes and forget them; False if the other end is gone before they are there."""
        scratch = bytearray(min(size, _BUFFER))
        while size > 0:
            count = self._socket.recv_into(scratch, min(size, len(scratch)))
            if count == 0:
                return False
            size -= count
        return True

    def _read(self, size: int) -> Frame | None:
        """Read ``size`` bytes; None if the other end is gone before they are there."""
        view = np.empty(size, dtype=np.uint8).data
        done = 0
        while done < size:
            count = self._socket.recv_into(view[done:])
            if count == 0:
                return None
            done += count
        return view
