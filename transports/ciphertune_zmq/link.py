"""The link of a zmq client to one worker."""

from __future__ import annotations

import collections
import contextlib
import random
import struct
import time
from concurrent.futures import Future

import zmq

from ciphertune.errors import ProtocolError, RefusedError, TransportError
from ciphertune.protocol import DEFAULT_LIMITS, Frame, Limits, Message, pack, unpack
from ciphertune.transport import Link, PendingReplies
from ciphertune_zmq.address import Address
from ciphertune_zmq.context import shared_context
from ciphertune_zmq.framing import MAX_FRAME, unwrap, wrap
from ciphertune_zmq.lookup import Lookup
from ciphertune_zmq.loop import HANDSHAKE_FAILURES, SocketLoop
from ciphertune_zmq.receive_limit import ReceiveLimit
from ciphertune_zmq.security import ClientCurve

_CHECK_SECONDS = 0.25
_AWAKE_SECONDS = 2.0
_SILENCE_SECONDS = 1.0
_CONNECT_SECONDS = 5.0
_NUMBER = struct.Struct("<Q")
_SPARE_BYTES = 1 << 16
_FIRST_KNOCK_SECONDS = 0.1
_LONGEST_KNOCK_SECONDS = 5.0
_REFUSED = (
    "it refused this client: the client's key is not authorised there, or the worker has another key than the one in "
    "this client's folder"
)
_UNAUTHORISED = "it refused this client: the client's key is not authorised there"
_DENIED = 400
"""Status of a client whose key was looked for in vain, in ZeroMQ's authentication protocol."""
_MOST = DEFAULT_LIMITS.total_bytes


def _most_bytes(limits: Limits) -> int:
    """Bytes of a message on the wire at most: its frames, its envelope, and what ZeroMQ and CURVE add to a frame."""
    return limits.header_bytes + limits.total_bytes + (limits.total_bytes >> 10) + _SPARE_BYTES


class _Reply(Future[Message]):
    """A reply that the thread which waits for it receives.

    Args:
        link: over which it comes.
    """

    def __init__(self, link: ZmqLink) -> None:
        super().__init__()
        self._link = link

    def result(self, timeout: float | None = None) -> Message:
        """See ``Future.result``."""
        return super().result(self._receive(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See ``Future.exception``."""
        return super().exception(self._receive(timeout))

    def _receive(self, seconds: float | None) -> float | None:
        """Receive until the reply is there; the seconds that are left to wait."""
        if seconds == 0 or self.done():
            return seconds
        end = None if seconds is None else time.monotonic() + seconds
        self._link.receive_until(self.done, end)
        return None if end is None else max(0.0, end - time.monotonic())


class ZmqLink(SocketLoop, Link):
    """Requests to one worker, many at a time, answered in any order.

    Args:
        address: the worker's, or the place where that is written: it is read again whenever the connection is gone, so
            that a worker may come back elsewhere.
        curve: keys, or None for a connection without.
        heartbeat: seconds between heartbeats.

    Raises:
        TransportError: ZeroMQ refuses the address.
    """

    def __init__(self, address: Address, curve: ClientCurve | None, heartbeat: float) -> None:
        super().__init__(zmq.DEALER, f"ciphertune-zmq-{address}", shared_context())
        self.name = str(address)
        self._pending: PendingReplies[Message] = PendingReplies(self.name)
        self._encrypted = curve is not None
        if curve is not None:
            self.identity = f"curve {curve.server.decode('ascii')}"
        self._outgoing: collections.deque[tuple[int, list[Frame], Limits]] = collections.deque()
        self._incoming: collections.deque[tuple[int, Message | ProtocolError]] = collections.deque()
        # What replies to requests that were sent may be, those that were given up included.
        self._expected: dict[int, Limits] = {}
        self._limit = ReceiveLimit(0)
        self._next_check = self._received = 0.0
        self._resting, self._awake_until = False, 0.0  # whether the thread sleeps for long, and until when it does not
        self._connected = False
        self._descriptor = -1
        self._lookup = Lookup(address, self.wake) if address.moves else None
        self._address = "" if address.moves else address.zmq  # that the socket connects to; empty for none
        self._refusals = 0  # in a row
        self._knock_at: float | None = None  # when it connects again, after it was refused
        self._problem: TransportError | str = _REFUSED  # why it does not connect before
        options = {
            zmq.IMMEDIATE: 1,  # Requests wait in this process, where they can fail, and not in the socket.
            zmq.HEARTBEAT_IVL: int(1000 * heartbeat),
            zmq.HEARTBEAT_TIMEOUT: int(3000 * heartbeat),
            zmq.CONNECT_TIMEOUT: int(1000 * _CONNECT_SECONDS),
            zmq.HANDSHAKE_IVL: int(1000 * _CONNECT_SECONDS),
            zmq.RECONNECT_IVL: 50,
            zmq.RECONNECT_IVL_MAX: 1000,
            zmq.MAXMSGSIZE: MAX_FRAME,
            zmq.IPV6: int(address.host.startswith("[")),
        }
        try:
            for option, value in options.items():
                self.socket.setsockopt(option, value)
            if curve is not None:
                self.socket.curve_publickey, self.socket.curve_secretkey = curve.pair.public, curve.pair.secret
                self.socket.curve_serverkey = curve.server
            if self._lookup is None:
                self.socket.connect(self._address)
            else:
                self._lookup.ask()
        except zmq.ZMQError as error:
            self.stop()
            raise TransportError(f"cannot connect to {address}: {error}") from error
        self.start()

    def submit(self, request: Message) -> Future[Message]:
        """See ``Link.submit``. Buffers are read until the request has left, so they must not be changed."""
        frames = pack(request)
        number, reply = self._pending.add(_Reply(self))
        if not reply.done():
            self._outgoing.append((number, frames, request.reply_limits))
            self.send()
            if not self.awaited_alone():
                self.attend_again()
        return reply

    def close(self) -> None:
        """See ``Link.close``."""
        self._pending.close()
        self.stop()

    def poll_seconds(self) -> float:
        """See ``SocketLoop.poll_seconds``."""
        self._resting = not self._pending and time.monotonic() >= self._awake_until
        seconds = 60.0 if self._resting else _CHECK_SECONDS
        return seconds if self._knock_at is None else max(0.0, min(seconds, self._knock_at - time.monotonic()))

    def awaited_alone(self) -> bool:
        """See ``SocketLoop.awaited_alone``."""
        return len(self._pending) <= 1

    def work(self, readable: bool) -> None:
        """See ``SocketLoop.work``."""
        if readable:
            self._receive()
        if self._knock_at is not None and time.monotonic() >= self._knock_at:
            self._knock_at = None
            self._connect()
        if self._lookup is not None and (found := self._lookup.take()) is not None:
            self._follow(found)
        if self._connected:
            self._send()
        elif self._knock_at is not None and self._outgoing:
            self._lost(self._problem)
        if self._pending and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_SECONDS
            self._limit.limit = _SPARE_BYTES + min(_MOST, sum(map(_most_bytes, self._expected.values())))
            if self._limit.enforce():
                self._lost("it sent more than a reply can be")

    def deliver(self) -> None:
        """See ``SocketLoop.deliver``: settles what replies came for."""
        while True:
            try:
                number, reply = self._incoming.popleft()
            except IndexError:  # several threads deliver
                return
            if isinstance(reply, Message):
                self._pending.answer(number, reply)
            else:
                self._pending.fail(number, reply)

    def send_now(self) -> bool:
        """See ``SocketLoop.send_now``."""
        if not self._connected:
            return True
        self._send()
        self._awake_until = time.monotonic() + _AWAKE_SECONDS
        return self._resting

    def connection_event(self, event: int, value: int) -> None:
        """See ``SocketLoop.connection_event``."""
        if event == zmq.EVENT_CONNECTED:
            self._descriptor = value
            self._limit.watch(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected, self._refusals = True, 0
            self._send()
        elif event == zmq.EVENT_DISCONNECTED:
            self._limit.forget(value)
            # One to an address that the worker has left may end after the new one was made.
            if self._lookup is None or value == self._descriptor:
                self._lost("the connection was lost" if self._knock_at is None else self._problem)
                self._look_up()
        elif event in HANDSHAKE_FAILURES:
            denied = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == _DENIED
            # One that ends in the midst of a handshake looks like one with another key, and may come back.
            self._refused(RefusedError(f"{self.name}: {_UNAUTHORISED}") if denied else _REFUSED)
        elif event == zmq.EVENT_CONNECT_RETRIED:
            self._lost("nothing answers there" + (f", at {self._address}" if self._lookup else ""))
            self._look_up()

    def ended(self) -> None:
        """See ``SocketLoop.ended``."""
        self.deliver()
        self._pending.close()

    def _send(self) -> None:
        while self._outgoing:
            number, frames, limits = self._outgoing.popleft()
            if number not in self._pending:
                continue
            if not self._expected and time.monotonic() - self._received > _SILENCE_SECONDS:
                # Signs of life that came meanwhile are no part of a reply.
                self._limit.message_complete(self._descriptor)
            try:
                self.socket.send_multipart(wrap(_NUMBER.pack(number), frames, self._encrypted), zmq.NOBLOCK, copy=False)
                self._expected[number] = limits
            except zmq.ZMQError as error:
                self._pending.fail(number, f"the request could not be sent: {error}")

    def _receive(self) -> None:
        while self.readable():
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            nbytes = sum(map(len, frames))
            self._limit.message_complete(self._descriptor, nbytes)
            self._received = time.monotonic()
            envelope = frames[0].bytes
            number = _NUMBER.unpack_from(envelope)[0] if len(envelope) >= _NUMBER.size else 0
            limits = self._expected.pop(number, None)
            if limits is None or number not in self._pending:
                continue
            try:
                if nbytes > _most_bytes(limits):
                    raise ProtocolError("it is longer than the reply to its request can be")
                parts = unwrap(envelope, [frame.buffer for frame in frames[1:]])
                self._incoming.append((number, unpack(parts, limits)))
            except ProtocolError as error:
                self._incoming.append((number, error))

    def _refused(self, problem: TransportError | str) -> None:
        """Connect again after a while: ZeroMQ itself would try twenty times a second."""
        if self._knock_at is None:
            with contextlib.suppress(zmq.ZMQError):
                self.socket.disconnect(self._address)
            self._wait_with(problem)
        self._lost(self._problem)

    def _wait_with(self, problem: TransportError | str) -> None:
        pause = min(_FIRST_KNOCK_SECONDS * 2 ** min(self._refusals, 16), _LONGEST_KNOCK_SECONDS)
        self._knock_at = time.monotonic() + pause * random.uniform(0.5, 1.0)
        self._refusals += 1
        self._problem = problem

    def _connect(self) -> None:
        if self._lookup is None:
            self.socket.connect(self._address)
        else:
            self._address = ""
            self._lookup.ask()

    def _look_up(self) -> None:
        """Ask where the worker is now; meanwhile ZeroMQ tries the address that was known."""
        if self._lookup is not None and self._knock_at is None:
            self._lookup.ask()

    def _follow(self, found: Address | TransportError) -> None:
        """Connect to where the worker is now."""
        if self._connected or self._knock_at is not None:
            return
        if isinstance(found, TransportError):
            if not self._address:
                self._wait_with(str(found))
                self._lost(self._problem)
        elif found.zmq != self._address:
            with contextlib.suppress(zmq.ZMQError):
                self.socket.disconnect(self._address)
            self._address = found.zmq
            try:
                self.socket.setsockopt(zmq.IPV6, int(found.host.startswith("[")))
                self.socket.connect(self._address)
            except zmq.ZMQError as error:
                self._address = ""
                self._wait_with(f"cannot connect to {found}: {error}")
                self._lost(self._problem)

    def _lost(self, why: TransportError | str) -> None:
        self._connected = False
        self.deliver()  # replies that came before
        # In this order: a request that is submitted in between fails. In the other it would be dropped unanswered.
        self._outgoing.clear()
        self._expected.clear()
        self._pending.fail_all(why)
