"""A client's end of one connection."""

from __future__ import annotations

import collections
import itertools
import struct
from concurrent.futures import Future

import zmq

from ciphertune.errors import ProtocolError, ReplyError, TransportError
from ciphertune.protocol import DEFAULT_LIMITS, Frame, Message, pack, unpack
from ciphertune.transport import Link, settle
from ciphertune_zmq.address import Address
from ciphertune_zmq.context import shared_context
from ciphertune_zmq.framing import NUMBER_BYTES, unwrap, wrap
from ciphertune_zmq.guard import Backlog
from ciphertune_zmq.loop import HANDSHAKE_FAILURES, SocketLoop
from ciphertune_zmq.security import ClientCurve

_GUARD_SECONDS = 0.25
_CONNECT_SECONDS = 5.0


class ZmqLink(Link):
    """Requests to one worker, many at a time, answered in any order.

    Args:
        address: the worker's.
        curve: keys, or None for a connection without.
        heartbeat: seconds between signs of life.
    """

    def __init__(self, address: Address, curve: ClientCurve | None, heartbeat: float) -> None:
        self.name = str(address)
        self._loop = _ClientLoop(address, curve, heartbeat)

    def submit(self, request: Message) -> Future[Message]:
        """See ``Link.submit``. Buffers are read until the request has left, so they must not be changed."""
        return self._loop.submit(pack(request))

    def close(self) -> None:
        """See ``Link.close``."""
        self._loop.stop()


class _ClientLoop(SocketLoop):
    def __init__(self, address: Address, curve: ClientCurve | None, heartbeat: float) -> None:
        super().__init__(zmq.DEALER, f"ciphertune-zmq-{address}", shared_context())
        self._address = address
        self._cut = curve is not None
        self._numbers = itertools.count(1)
        self._outgoing: collections.deque[tuple[bytes, list[Frame]]] = collections.deque()
        self._pending: dict[bytes, Future[Message]] = {}
        self._backlog = Backlog(DEFAULT_LIMITS.total_bytes)
        self._connected = False
        self._descriptor = -1
        options = {
            zmq.IMMEDIATE: 1,  # Requests wait here, where they can fail, not in the socket.
            zmq.HEARTBEAT_IVL: int(1000 * heartbeat),
            zmq.HEARTBEAT_TIMEOUT: int(3000 * heartbeat),
            zmq.CONNECT_TIMEOUT: int(1000 * _CONNECT_SECONDS),
            zmq.HANDSHAKE_IVL: int(1000 * _CONNECT_SECONDS),
            zmq.RECONNECT_IVL: 50,
            zmq.RECONNECT_IVL_MAX: 1000,
            zmq.MAXMSGSIZE: DEFAULT_LIMITS.buffer_bytes,
            zmq.IPV6: int(address.host.startswith("[")),
        }
        try:
            for option, value in options.items():
                self.socket.setsockopt(option, value)
            if curve is not None:
                self.socket.curve_publickey, self.socket.curve_secretkey = curve.pair.public, curve.pair.secret
                self.socket.curve_serverkey = curve.server
            self.socket.connect(address.zmq)
        except zmq.ZMQError as error:
            self.stop()
            raise TransportError(f"cannot connect to {address}: {error}") from error
        self.begin()

    def submit(self, frames: list[Frame]) -> Future[Message]:
        future: Future[Message] = Future()
        number = struct.pack("<Q", next(self._numbers))
        self._pending[number] = future
        # However it ends, answered, failed or cancelled, it is forgotten.
        future.add_done_callback(lambda _: self._pending.pop(number, None))
        self._outgoing.append((number, frames))
        if self.stopping:
            self._fail_all("the link is closed")
        else:
            self.wake()
        return future

    def poll_seconds(self) -> float:
        return _GUARD_SECONDS if self._pending else 60.0

    def work(self, readable: bool) -> None:
        if readable:
            self._receive()
        if self._connected:
            self._send()
        if self._pending and self._backlog.enforce():
            self._lost("it sent more than a reply can be")

    def connection_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self._descriptor = value
            self._backlog.opened(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True
            self._send()
        elif event == zmq.EVENT_DISCONNECTED:
            self._backlog.closed(value)
            self._lost("the connection was lost")
        elif event in HANDSHAKE_FAILURES:
            self._lost(
                "it refused this client: its key is not among those authorised there, or the worker's own key is not "
                "the one this client has"
            )
        elif event == zmq.EVENT_CONNECT_RETRIED:
            self._lost("nothing answers there")

    def ended(self) -> None:
        self._fail_all("the link is closed")

    def _send(self) -> None:
        while self._outgoing:
            number, frames = self._outgoing.popleft()
            future = self._pending.get(number)
            if future is None:
                continue
            try:
                self.socket.send_multipart(wrap(number, frames, self._cut), zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                settle(future, TransportError(f"{self._address}: the request could not be sent: {error}"))

    def _receive(self) -> None:
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._backlog.delivered(self._descriptor)
            envelope = frames[0].bytes
            future = self._pending.get(envelope[:NUMBER_BYTES])
            if future is None:
                continue
            try:
                settle(future, unpack(unwrap(envelope, [frame.buffer for frame in frames[1:]])))
            except ProtocolError as error:
                settle(future, ReplyError(f"{self._address} sent a malformed reply: {error}"))

    def _lost(self, why: str) -> None:
        self._connected = False
        self._fail_all(why)

    def _fail_all(self, why: str) -> None:
        self._outgoing.clear()
        for future in list(self._pending.values()):
            settle(future, TransportError(f"{self._address}: {why}"))
