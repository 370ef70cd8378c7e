"""The listener of a zmq worker: one socket for all connections."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ciphertune.errors import ProtocolError, TransportError
from ciphertune.protocol import Frame
from ciphertune.transport import Connections, Listener, RequestHandler, connections_allowed
from ciphertune_zmq.address import Address
from ciphertune_zmq.framing import MAX_FRAME, NUMBER_BYTES, max_parts, unwrap, wrap
from ciphertune_zmq.loop import SocketLoop
from ciphertune_zmq.receive_limit import ReceiveLimit
from ciphertune_zmq.security import CURVE_PEER, AuthorisedClients, ServerCurve

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
_KEYS_SECONDS = 1.0
_ZAP_ADDRESS = 3
# Of all connections of all listeners of this process.
_numbers = itertools.count(1)


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


@dataclasses.dataclass(frozen=True)
class _Known:
    """A connection over which a message came.

    Attributes:
        route: ZeroMQ's name of it.
        peer: the client.
        number: by which the handler knows it.
    """

    route: bytes
    peer: str
    number: int


class _Authenticator(ThreadAuthenticator):
    """Asks for each key whether it is authorised, and tells of those that are not, with their addresses.

    Args:
        context: of the socket.
        clients: those that are authorised.
        refused: told of an address and a reason.
    """

    def __init__(
        self, context: zmq.Context[Any], clients: AuthorisedClients, refused: Callable[[str, str], None]
    ) -> None:
        super().__init__(context)
        self._authorised = clients
        self._refused = refused
        self._address = ""
        self.start()
        self.configure_curve_callback(domain="*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this Z85 public key may connect."""
        if self._authorised.callback(domain, key):
            return True
        self._refused(self._address, f"the key {key.decode('ascii', 'replace')} is not authorised")
        return False

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """See ``zmq.auth.Authenticator``; requests are handled one after the other."""
        self._address = msg[_ZAP_ADDRESS].decode("ascii", "replace") if len(msg) > _ZAP_ADDRESS else ""
        await super().handle_zap_message(msg)


@dataclasses.dataclass
class _Outgoing:
    """A reply: where to, the frames on the wire, and what is called once they have left."""

    route: bytes
    parts: list[Frame]
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
        self._authenticator: _Authenticator | None = None
        self._clients = None if curve is None else curve.clients
        self._next_check = self._next_keys = 0.0
        self._addresses: dict[int, str] = {}  # of connections, by descriptor
        self._known: dict[int, _Known] = {}  # by descriptor
        # Ends of connections that are yet to be told of, though their descriptors have new ones.
        self._stale: collections.Counter[int] = collections.Counter()
        self._told = 0  # connections that were refused, and are yet to end
        self._peers: dict[str, bytes] = {}  # clients that have come, with their keys
        self._missing: set[str] = set()  # those whose keys were not there when last looked for
        self._revoked: set[str] = set()
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

    def send_now(self) -> bool:
        # Large ones are let go of by the thread once they have left.
        for _ in range(len(self._replies)):
            if len(self._replies[0].parts) > 1:
                break
            self._send(self._replies.popleft())
        return self.sending

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
            self._end_excess()
            if time.monotonic() >= self._next_keys:
                self._next_keys = time.monotonic() + _KEYS_SECONDS
                self._revoke()
            count = self._limit.enforce()
            if count:
                log.warning("shut down %d connections whose incomplete messages were over the limit", count)

    def deliver(self) -> None:
        return  # the handler takes requests as they come

    def connection_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._limit.watch(value)
            self._addresses[value] = address = self._limit.address(value)
            self._connections.came(value, address)
            self._end_excess()
        elif event == zmq.EVENT_DISCONNECTED:
            self._limit.forget(value)
            self._connections.gone(value)
            self._gone(value)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            # The authenticator has told of it, and the end of its connection follows.
            self._told += 1

    def _gone(self, descriptor: int) -> None:
        """Tell the handler of a connection that has ended."""
        address = self._addresses.pop(descriptor, "")
        if self._stale[descriptor]:
            self._stale[descriptor] -= 1
        elif (known := self._known.pop(descriptor, None)) is not None:
            self._handler.left(known.peer, known.number)
        elif self._told:
            self._told -= 1
        else:
            self._handler.refused(address or "unknown", "it failed the handshake, or left after it without a message")
        self._stale += collections.Counter()  # drops zeros

    def _connection(self, descriptor: int, route: bytes, peer: str) -> int | None:
        """The number of the connection that a message came over; None where that cannot be told."""
        if descriptor < 0:
            return None
        known = self._known.get(descriptor)
        if known is not None and known.route != route:
            self._stale[descriptor] += 1
            self._handler.left(known.peer, known.number)
            known = None
        if known is None:
            known = self._known[descriptor] = _Known(route, peer, next(_numbers))
            name, _, key = peer.partition(":")
            if name == CURVE_PEER:
                self._peers[peer] = key.encode("ascii", "replace")
        return known.number

    def _revoke(self) -> None:
        """End the connections and sessions of clients whose keys are there no more."""
        authorised = None if self._clients is None else self._clients.keys()
        if authorised is None:
            return
        missing = {peer for peer, key in self._peers.items() if key not in authorised}
        # A file may be away for a moment while it is replaced.
        revoked = missing & self._missing
        for peer in revoked - self._revoked:
            self._handler.dismiss(peer)
        for descriptor in [each for each, known in self._known.items() if known.peer in revoked]:
            self._limit.shut_down(descriptor)
        self._missing, self._revoked = missing, revoked

    def _end_excess(self) -> None:
        for descriptor in self._connections.excess():
            self._limit.shut_down(descriptor)

    def ended(self) -> None:
        for _, release in self._unsent:
            release()
        while self._replies:
            self._replies.popleft().release()
        self._end_authentication()

    def _authenticate(self, curve: ServerCurve) -> None:
        self._authenticator = _Authenticator(self.context, curve.clients, self._handler.refused)
        self.socket.curve_secretkey, self.socket.curve_publickey = curve.pair.secret, curve.pair.public
        self.socket.curve_server = True

    def _end_authentication(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    def _receive(self) -> None:
        # A few at a time, so that a client that keeps sending does not delay replies.
        # Small ones come last: then there is nothing else to do when one of them is to be evaluated here.
        small: list[tuple[bytes, list[zmq.Frame], str, int]] = []
        for count in range(_RECEIVE_QUEUE):
            if count and not self.readable():
                break
            frames: list[zmq.Frame] = []
            limits, nbytes = self._handler.limits, 0
            most = max_parts(limits) + _ROUTING_FRAMES
            more = True
            while more:
                frame = self.socket.recv(zmq.NOBLOCK, copy=False)
                more = frame.more
                nbytes += len(frame)
                # Without the frames that are not kept the message is refused below.
                if len(frames) <= most and nbytes <= limits.header_bytes + limits.total_bytes + _ENVELOPE_BYTES:
                    frames.append(frame)
            descriptor, peer = _descriptor(frame), _peer(frame)
            # The route, which comes first, was made here.
            self._limit.message_complete(descriptor, nbytes - len(frames[0]))
            self._connections.known(descriptor)
            if peer in self._revoked:
                self._revoke()  # unless it was let in again meanwhile
                if peer in self._revoked:
                    self._limit.shut_down(descriptor)
                    continue
            if len(frames) < _ROUTING_FRAMES or len(frames[1]) < NUMBER_BYTES:
                self._handler.refused(peer, "a message without a request number")
                continue
            message = (frames[0].bytes, frames[_ROUTING_FRAMES - 1 :], peer, descriptor)
            if len(frames) == _ROUTING_FRAMES:
                small.append(message)
            else:
                self._submit(*message, idle=False)
        for index, message in enumerate(small):
            self._submit(*message, idle=index + 1 == len(small) and not self.readable())

    def _submit(self, route: bytes, frames: list[zmq.Frame], peer: str, descriptor: int, idle: bool) -> None:
        """Hand a message to the handler; ``idle``: nothing else is to be done now."""
        envelope = frames[0].bytes
        try:
            parts = unwrap(envelope, [frame.buffer for frame in frames[1:]])
        except ProtocolError as error:
            # Without frames the handler answers with an error.
            self._handler.refused(peer, f"a malformed message: {error}")
            parts = []
        connection = self._connection(descriptor, route, peer)
        reply = self._reply_to(route, envelope[:NUMBER_BYTES])
        self._handler.submit(parts, peer, reply, connection, idle=idle)

    def _reply_to(self, route: bytes, number: bytes) -> Callable[[list[Frame], Callable[[], None]], None]:
        def reply(frames: list[Frame], release: Callable[[], None]) -> None:
            parts = wrap(number, frames, self._clients is not None)
            self._replies.append(_Outgoing(route, parts, release))
            if self.stopping:
                release()
            else:
                self.send()

        return reply

    def _send(self, out: _Outgoing) -> None:
        parts: list[Any] = [out.route, *out.parts]
        try:
            # A copy of a small message is cheaper than to track when ZeroMQ has sent the memory.
            if len(out.parts) == 1:
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
    for name in (CURVE_PEER, "Peer-Address"):
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
