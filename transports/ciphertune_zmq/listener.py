"""The listener of a zmq worker: one socket for all connections."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ciphertune.errors import ProtocolError, TransportError
from ciphertune.protocol import Frame
from ciphertune.transport import Connections, Listener, RequestHandler, connections_allowed
from ciphertune_zmq.address import Address
from ciphertune_zmq.framing import MAX_FRAME, NUMBER_BYTES, max_parts, unwrap, wrap
from ciphertune_zmq.loop import HANDSHAKE_FAILURES, SocketLoop
from ciphertune_zmq.receive_limit import ReceiveLimit
from ciphertune_zmq.security import ServerCurve

if TYPE_CHECKING:
    from ciphertune_zmq import ZmqServeOptions

log = logging.getLogger(__name__)

_CHECK_SECONDS = 0.25
_SENDING_SECONDS = 0.01
_HANDSHAKE_SECONDS = 5
# Messages in the socket's queues, to this process and to one client; more wait at their senders.
_RECEIVE_QUEUE = 8
_SEND_QUEUE = 64
_ROUTING_FRAMES = 2
_ENVELOPE_BYTES = 1 << 16
# Replies kept for clients that do not read theirs.
_MAX_REPLIES = 1 << 14
# Bytes below which a copy is cheaper than tracking when ZeroMQ has sent the memory.
_COPY_BYTES = 1 << 16


class ZmqListener(Listener):
    """Serves a handler at one address.

    Args:
        handler: where requests go.
        address: where to listen; port ``*`` for any free one.
        curve: keys, or None to take any client.
        options: of the transport.

    Raises:
        TransportError: the address cannot be used.
    """

    def __init__(
        self, handler: RequestHandler, address: Address, curve: ServerCurve | None, options: ZmqServeOptions
    ) -> None:
        self._loop = _ServerLoop(handler, address, curve, options)
        bound = self._loop.bound
        if bound.host in ("0.0.0.0", "*", "[::]"):  # noqa: S104 - asked for by the user
            import socket

            bound = dataclasses.replace(bound, host=socket.gethostname())
        self.address = str(bound)

    def close(self, linger: float = 0.0) -> None:
        """See ``Listener.close``."""
        end = time.monotonic() + linger
        while time.monotonic() < end and self._loop.sending:
            time.sleep(_SENDING_SECONDS)
        self._loop.stop()


@dataclasses.dataclass
class _Outgoing:
    route: bytes
    number: bytes
    frames: list[Frame]
    release: Callable[[], None]


class _ServerLoop(SocketLoop):
    def __init__(
        self, handler: RequestHandler, address: Address, curve: ServerCurve | None, options: ZmqServeOptions
    ) -> None:
        super().__init__(zmq.ROUTER, "ciphertune-zmq-listener")
        self._handler = handler
        self._limit = ReceiveLimit(options.max_incomplete_bytes)
        self._connections: Connections[int] = Connections(connections_allowed(options.connections))
        self._replies: collections.deque[_Outgoing] = collections.deque()
        self._unsent: list[tuple[Any, Callable[[], None]]] = []
        self._authenticator: ThreadAuthenticator | None = None
        self._next_check = 0.0
        settings = {
            zmq.ROUTER_MANDATORY: 1,  # A reply to a client that has gone is an error, not dropped silently.
            zmq.HEARTBEAT_IVL: int(1000 * options.heartbeat),
            zmq.HEARTBEAT_TIMEOUT: int(3000 * options.heartbeat),
            zmq.HANDSHAKE_IVL: 1000 * _HANDSHAKE_SECONDS,
            zmq.RCVHWM: _RECEIVE_QUEUE * (_ROUTING_FRAMES + 2),
            zmq.SNDHWM: _SEND_QUEUE,
            zmq.MAXMSGSIZE: MAX_FRAME,
            zmq.BACKLOG: 512,
            zmq.IPV6: int(address.host.startswith("[")),
        }
        try:
            for option, value in settings.items():
                self.socket.setsockopt(option, value)
            if curve is not None:
                self._authenticate(curve)
            self.socket.bind(address.zmq)
        except zmq.ZMQError as error:
            self._end_authentication()
            self.stop()
            raise TransportError(f"cannot listen at {address}: {error}") from error
        self.bound = address
        if address.scheme == "tcp":
            endpoint = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))
            self.bound = dataclasses.replace(address, port=endpoint.rpartition(":")[2])
        self.start()

    @property
    def sending(self) -> bool:
        """Whether replies have not been sent yet."""
        return bool(self._replies or self._unsent)

    def poll_seconds(self) -> float:
        return _SENDING_SECONDS if self.sending else _CHECK_SECONDS

    def work(self, readable: bool) -> None:
        if readable:
            self._receive()
        for _ in range(len(self._replies)):
            self._send(self._replies.popleft())
        if self._unsent:
            left = []
            for tracker, release in self._unsent:
                if tracker.done:
                    release()
                else:
                    left.append((tracker, release))
            self._unsent = left
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_SECONDS
            count = self._limit.enforce()
            if count:
                log.warning("shut down %d connections whose incomplete messages were over the limit", count)

    def connection_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._limit.watch(value)
            self._connections.came(value, self._limit.address(value))
            for descriptor in self._connections.excess():
                self._limit.shut_down(descriptor)
        elif event == zmq.EVENT_DISCONNECTED:
            self._limit.forget(value)
            self._connections.gone(value)
        elif event in HANDSHAKE_FAILURES:
            log.info("a connection was refused: it failed the handshake")

    def ended(self) -> None:
        for _, release in self._unsent:
            release()
        while self._replies:
            self._replies.popleft().release()
        self._end_authentication()

    def _authenticate(self, curve: ServerCurve) -> None:
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=curve.clients)
        self.socket.curve_secretkey, self.socket.curve_publickey = curve.pair.secret, curve.pair.public
        self.socket.curve_server = True

    def _end_authentication(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    def _receive(self) -> None:
        # A few at a time, so that a client that keeps sending does not delay replies.
        for _ in range(_RECEIVE_QUEUE):
            frames: list[zmq.Frame] = []
            limits, nbytes = self._handler.limits, 0
            most = max_parts(limits) + _ROUTING_FRAMES
            try:
                more = True
                while more:
                    frame = self.socket.recv(zmq.NOBLOCK, copy=False)
                    more = frame.more
                    nbytes += len(frame)
                    # Without the frames that are not kept the message is refused below.
                    if len(frames) <= most and nbytes <= limits.header_bytes + limits.total_bytes + _ENVELOPE_BYTES:
                        frames.append(frame)
            except zmq.Again:
                return
            self._limit.message_complete(_descriptor(frame))
            self._connections.known(_descriptor(frame))
            if len(frames) < _ROUTING_FRAMES or len(frames[1]) < NUMBER_BYTES:
                log.info("ignored a message without a request number")
                continue
            route, envelope = frames[0].bytes, frames[1].bytes
            try:
                parts = unwrap(envelope, [frame.buffer for frame in frames[_ROUTING_FRAMES:]])
            except ProtocolError as error:
                # Without frames the handler answers with an error.
                log.info("a malformed message: %s", error)
                parts = []
            self._handler.submit(parts, _peer(frame), self._reply_to(route, envelope[:NUMBER_BYTES]))

    def _reply_to(self, route: bytes, number: bytes) -> Callable[[list[Frame], Callable[[], None]], None]:
        def reply(frames: list[Frame], release: Callable[[], None]) -> None:
            self._replies.append(_Outgoing(route, number, frames, release))
            if self.stopping:
                release()
            else:
                self.wake()

        return reply

    def _send(self, out: _Outgoing) -> None:
        parts: Sequence[Any] = [out.route, *wrap(out.number, out.frames, self._authenticator is not None)]
        small = sum(len(frame) for frame in out.frames) < _COPY_BYTES
        try:
            if small:
                self.socket.send_multipart(parts, zmq.NOBLOCK)
                out.release()
            else:
                tracker = self.socket.send_multipart(parts, zmq.NOBLOCK, copy=False, track=True)
                self._unsent.append((tracker, out.release))
        except zmq.Again:
            # Its queue is full. Quotas bound the replies that wait here, except refusals, which count in no quota.
            if len(self._replies) < _MAX_REPLIES:
                self._replies.append(out)
            else:
                out.release()
        except zmq.ZMQError as error:
            # The client has gone; it repeats the request if it still needs the reply.
            log.info("a reply was dropped: %s", error)
            out.release()


def _peer(frame: zmq.Frame) -> str:
    """The name of the client for quotas and sessions: its public key, or its address without CURVE."""
    for name in ("User-Id", "Peer-Address"):
        try:
            value = frame.get(name)
        except zmq.ZMQError:
            continue
        if value:
            return f"{name}:{value}"
    return "unknown"


def _descriptor(frame: zmq.Frame) -> int:
    try:
        return int(frame.get(zmq.SRCFD))
    except (zmq.ZMQError, TypeError, ValueError):
        return -1
