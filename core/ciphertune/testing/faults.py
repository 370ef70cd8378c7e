"""Fault injection: a transport around any other that loses, delays and damages messages on command."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from ciphertune.errors import ProtocolError
from ciphertune.plugins import registry
from ciphertune.protocol import Message, pack, unpack
from ciphertune.transport import CHAIN, Link, PendingReplies, WrappingTransport

Fault = Literal["drop", "delay", "duplicate", "corrupt", "reorder"]


@dataclasses.dataclass
class _Order:
    fault: Fault
    kind: str
    left: int
    seconds: float = 0.0
    where: Literal["header", "buffers"] = "header"


class Faults:
    """The faults of the links of a transport, as a test orders them. Orders apply to the next requests, in turn.

    Args:
        register: adds a transport class to the registry under its name.

    Attributes:
        done: faults so far, by name.
        sent: requests that the real links sent, by kind.
    """

    def __init__(self, register: Callable[[str, Any], None]) -> None:
        self._register = register
        self._orders: list[_Order] = []
        self._kept: list[Callable[[], None]] = []
        self._wanted = 0
        self._cut = False
        self._links: list[PendingReplies[Message]] = []
        self._lock = threading.RLock()
        self.done: collections.Counter[str] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()

    def over(self, transport: str = "local") -> str:
        """Register the faulty transport; its name around another one, for a selection string."""
        self._register(registry.TRANSPORTS, type("Faulty", (FaultyTransport,), {"faults": self}))
        return f"{FaultyTransport.name}{CHAIN}{transport}"

    def drop(self, count: int = 1, kind: str = "evaluate") -> None:
        """Lose requests: they are not sent, and never answered."""
        self._order(_Order("drop", kind, count))

    def delay(self, seconds: float, count: int = 1, kind: str = "evaluate") -> None:
        """Deliver replies late, by a number of seconds."""
        self._order(_Order("delay", kind, count, seconds=seconds))

    def duplicate(self, count: int = 1, kind: str = "evaluate") -> None:
        """Send requests twice, as a network does that retransmits."""
        self._order(_Order("duplicate", kind, count))

    def corrupt(self, count: int = 1, kind: str = "evaluate", where: Literal["header", "buffers"] = "header") -> None:
        """Damage replies: a byte of the header, or the last byte of every buffer, is changed."""
        self._order(_Order("corrupt", kind, count, where=where))

    def reorder(self, count: int = 2, kind: str = "evaluate") -> None:
        """Keep the replies of the next requests until all are there, or ``release``, and deliver them in reverse."""
        with self._lock:
            self._wanted += count
        self._order(_Order("reorder", kind, count))

    def cut(self) -> None:
        """Lose the connection: pending requests fail, and so do all others until ``heal``."""
        with self._lock:
            self._cut = True
            self.done["cut"] += 1
            links = list(self._links)
        for pending in links:
            pending.fail_all("the connection was lost")

    def heal(self) -> None:
        """Restore the connection, and cancel all orders."""
        with self._lock:
            self._cut = False
            self._orders.clear()
        self.release()

    def release(self) -> None:
        """Deliver the replies that ``reorder`` keeps, the last one first."""
        with self._lock:
            kept, self._kept, self._wanted = self._kept, [], 0
        for deliver in reversed(kept):
            deliver()

    def _open(self, name: str) -> PendingReplies[Message]:
        """Make the table of a new link's pending requests, which ``cut`` fails."""
        pending: PendingReplies[Message] = PendingReplies(name)
        with self._lock:
            self._links.append(pending)
        return pending

    def _order(self, order: _Order) -> None:
        with self._lock:
            self._orders.append(order)

    def _next(self, kind: str) -> _Order | None:
        with self._lock:
            for order in self._orders:
                if order.kind == kind:
                    order.left -= 1
                    if order.left == 0:
                        self._orders.remove(order)
                    self.done[order.fault] += 1
                    return order
            return None

    def _carry(self, link: Link, pending: PendingReplies[Message], request: Message) -> Future[Message]:
        """Send a request over the real link, or do what was ordered."""
        number, reply = pending.add()
        if self._cut:
            pending.fail(number, "the connection was lost")
        if reply.done():
            return reply
        order = self._next(request.kind)
        if order is not None and order.fault == "drop":
            return reply
        self.sent[request.kind] += 1
        if order is not None and order.fault == "duplicate":
            self.sent[request.kind] += 1
            link.submit(request)
        inner = link.submit(request)
        reply.add_done_callback(lambda _: inner.cancel())
        inner.add_done_callback(lambda _: self._answered(pending, number, inner, order))
        return reply

    def _answered(
        self, pending: PendingReplies[Message], number: int, inner: Future[Message], order: _Order | None
    ) -> None:
        if inner.cancelled():
            return
        where = order.where if order is not None and order.fault == "corrupt" else None
        deliver = functools.partial(_deliver, pending, number, inner, where)
        if order is None or order.fault in ("duplicate", "corrupt"):
            deliver()
        elif order.fault == "delay":
            timer = threading.Timer(order.seconds, deliver)
            timer.daemon = True
            timer.start()
        else:
            with self._lock:
                self._kept.append(deliver)
                complete = len(self._kept) >= self._wanted
            if complete:
                self.release()


@dataclasses.dataclass(frozen=True)
class FaultyOptions:
    """A test gives its orders otherwise."""


class FaultyTransport(WrappingTransport):
    """Does what ``faults`` orders."""

    name = "faulty"
    Options = FaultyOptions
    faults: Faults

    def wrap(self, link: Link) -> Link:
        """See ``WrappingTransport.wrap``."""
        return _FaultyLink(link, self.faults)


class _FaultyLink(Link):
    def __init__(self, link: Link, faults: Faults) -> None:
        self._link = link
        self._faults = faults
        self.name, self.identity = link.name, link.identity
        self._pending = faults._open(link.name)

    def submit(self, request: Message) -> Future[Message]:
        return self._faults._carry(self._link, self._pending, request)

    def close(self) -> None:
        self._pending.close()
        self._link.close()


def _deliver(
    pending: PendingReplies[Message],
    number: int,
    inner: Future[Message],
    where: Literal["header", "buffers"] | None,
) -> None:
    """Settle a request as the real link settled its own, with the reply damaged at ``where``."""
    error = inner.exception()
    try:
        if error is not None:
            pending.fail(number, error)
        else:
            pending.answer(number, inner.result() if where is None else _damaged(inner.result(), where))
    except ProtocolError as malformed:
        pending.fail(number, malformed)


def _damaged(reply: Message, where: Literal["header", "buffers"]) -> Message:
    """A reply as it is read after some bytes of it have changed. Raises ``ProtocolError``."""
    frames = [bytearray(frame) for frame in pack(reply)]
    for frame in frames[:1] if where == "header" else frames[1:]:
        # The header's first byte says what it is; a buffer's last one is the top of a number.
        frame[0 if where == "header" else -1] ^= 0x55
    return unpack(frames)
