"""A training step as a discrete-event model of one client, its network card, and workers: a function of plain numbers.

The client computes one thing at a time. Its card carries one message up and one down at a time, in the order in which
they are ready; a worker evaluates one product at a time, in the order in which requests arrive.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

What = Literal["rest", "encrypt", "decrypt", "evaluate", "uplink", "downlink", "latency"]
"""Uses of time: ``rest`` is what the client computes itself, ``latency`` the way of a message whatever its size."""


Processors = Literal["own", "shared for messages", "shared by workers", "one"]
"""Whether client and workers each have a processor of their own, all workers have one, or all of them, and who shares
one computes in turn. Whoever shares one also takes turns at what the transport itself takes: its rate and its overhead.
Workers that share one for messages evaluate each with their own.
"""


@dataclasses.dataclass(frozen=True)
class Request:
    """One message to a worker and its reply.

    Attributes:
        workers: any of which can evaluate it; the one with least under way is asked.
        encrypt: seconds at the client before it can be sent.
        up, down: bytes.
        evaluate: seconds at the worker.
        decrypt: seconds at the client once the reply is there.
        after: seconds that the worker is busy with it when the reply has left; of interest where many clients share it.
    """

    workers: tuple[int, ...]
    encrypt: float
    up: int
    evaluate: float
    down: int
    decrypt: float
    after: float = 0.0


@dataclasses.dataclass(frozen=True)
class Product:
    """One outsourced product of a micro-batch.

    Attributes:
        rest: seconds of what the client computes itself before it.
        requests: all sent before the first reply is awaited.
        ahead: seconds of what the client computes for it at any time before; the simulation leaves it out.
    """

    rest: float
    requests: tuple[Request, ...]
    ahead: float = 0.0


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Products one after the other, and the client's own seconds after the last of them."""

    products: Sequence[Product]
    rest: float = 0.0


@dataclasses.dataclass(frozen=True)
class Network:
    """Network between client and workers.

    Attributes:
        bandwidth: bytes a second that the client's card sends; all workers share it.
        latency: seconds one way.
        rate: bytes a second that the transport itself moves on one connection, each way.
        overhead: seconds that the transport adds to the way of a request and its reply together.
        processors: see ``Processors``.
        down: bytes a second that the client's card receives; as it sends if None.
        client_rate: bytes a second that the client's end of the transport carries each way, on all connections.
    """

    bandwidth: float
    latency: float
    rate: float = math.inf
    overhead: float = 0.0
    processors: Processors = "own"
    down: float | None = None
    client_rate: float = math.inf

    def card(self, way: Literal["uplink", "downlink"]) -> float:
        """Bytes a second of the client's card, and of the processor that serves it, in one direction."""
        card = self.bandwidth if way == "uplink" or self.down is None else self.down
        return min(card, self.client_rate)


class Activity(NamedTuple):
    """One activity of a simulated step.

    Attributes:
        what: see ``What``.
        worker: index of the worker it concerns; -1 for what the client computes.
        start, end: seconds.
        cause: the activity whose end was waited for, as an index; -1 for the beginning.
    """

    what: What
    worker: int
    start: float
    end: float
    cause: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        activities: in the order in which they were begun by whoever does them.
        last: the one that ends the step, as an index; -1 where there is none.
        workers: how many there are.
    """

    activities: Sequence[Activity]
    last: int
    workers: int

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.activities[self.last].end if self.last >= 0 else 0.0

    def critical(self) -> dict[What, float]:
        """The step's seconds by what they were spent on, following from the end back what each thing waited for."""
        spent: dict[What, float] = dict.fromkeys(_WHATS, 0.0)
        index, until = self.last, self.seconds
        while index >= 0:
            activity = self.activities[index]
            # A long message may end later than it leaves room for the next one.
            spent[activity.what] += until - activity.start
            index, until = activity.cause, activity.start
        return spent

    def busy(self) -> dict[tuple[What, int], float]:
        """Seconds that each sort of activity took, by worker; not more than the step for what is done one at a time."""
        taken: dict[tuple[What, int], float] = collections.defaultdict(float)
        for activity in self.activities:
            taken[activity.what, activity.worker] += activity.end - activity.start
        return dict(taken)

    def chart(self, start: float, end: float, bins: int) -> dict[What, list[float]]:
        """Share of every part of a time by sort of activity, all workers together: 1.0 is one at a time."""
        width = (end - start) / bins
        rows: dict[What, list[float]] = {what: [0.0] * bins for what in _WHATS}
        for a in self.activities:
            if a.end <= start or a.start >= end:
                continue
            row = rows[a.what]
            for index in range(max(0, int((a.start - start) / width)), bins):
                left = start + index * width
                if left >= a.end:
                    break
                row[index] += max(0.0, min(a.end, left + width) - max(a.start, left)) / width
        return rows


_WHATS: tuple[What, ...] = ("rest", "encrypt", "decrypt", "evaluate", "uplink", "downlink", "latency")


def simulate(
    micro_batches: Sequence[MicroBatch], interleave: int, workers: int, network: Network, closing: float = 0.0
) -> Timeline:
    """Simulate a step.

    Args:
        micro_batches: of the step, in order.
        interleave: how many are under way at once. They take turns: one hands over where it awaits a reply, and goes on
            when the reply is there and it is its turn again; in the turn in which one ends, the next one begins.
        workers: how many there are.
        network: see ``Network``.
        closing: the client's own seconds after all of them, for the optimizer.

    >>> half = MicroBatch([Product(0.0, (Request((0,), 1.0, 10, 4.0, 10, 1.0),))])
    >>> network = Network(bandwidth=10.0, latency=0.5)
    >>> [simulate([half, half], interleave, 1, network).seconds for interleave in (1, 2)]
    [18.0, 13.0]
    """
    run = _Run(workers, network)
    run.interleave([run.steps(micro_batch) for micro_batch in micro_batches], interleave)
    run.compute("rest", closing)
    return Timeline(run.activities, run.last, workers)


@dataclasses.dataclass
class _Resource:
    """Resource used by one activity at a time: when it is free again, and after which activity."""

    free: float = 0.0
    last: int = -1


@dataclasses.dataclass
class _Sent:
    """A request under way; ``answered`` is when its reply is at the client."""

    request: Request
    worker: int
    cause: int
    answered: float | None = None


class _Run:
    """The state of one simulation."""

    def __init__(self, workers: int, network: Network) -> None:
        self.activities: list[Activity] = []
        self.last = -1
        self._network = network
        self._now = 0.0
        self._client = _Resource()
        shared = self._client if network.processors == "one" else _Resource()
        own = network.processors in ("own", "shared for messages")
        self._workers = [_Resource() if own else shared for _ in range(workers)]
        self._cards = {"uplink": _Resource(), "downlink": _Resource()}
        self._turns = None if network.processors == "own" else _Resource()
        self._connections = {way: [self._turns or _Resource() for _ in range(workers)] for way in self._cards}
        self._under_way = [0] * workers
        self._last_used = [0] * workers
        self._events: list[tuple[float, int, int, _Sent]] = []
        self._count = 0

    def steps(self, micro_batch: MicroBatch) -> Iterator[_Sent]:
        """Run a micro-batch, yielding what it awaits wherever it does."""
        for product in micro_batch.products:
            self.compute("rest", product.rest)
            sent = []
            for request in product.requests:
                self.compute("encrypt", request.encrypt)
                sent.append(self._send(request))
            for one in sent:
                yield one
                self.compute("decrypt", one.request.decrypt)
        self.compute("rest", micro_batch.rest)

    def interleave(self, tasks: Sequence[Iterator[_Sent]], width: int) -> None:
        """Run tasks in strict order, as many at once as ``width``, each until it awaits a reply."""
        to_start = collections.deque(tasks)
        under_way: collections.deque[tuple[Iterator[_Sent], _Sent | None]] = collections.deque()
        for _ in range(min(width, len(tasks))):
            under_way.append((to_start.popleft(), None))
        while under_way:
            task, awaited = under_way.popleft()
            if awaited is not None:
                self._await(awaited)
            try:
                under_way.append((task, next(task)))
            except StopIteration:
                if to_start:
                    under_way.appendleft((to_start.popleft(), None))

    def compute(self, what: What, seconds: float) -> None:
        """Let the client compute for some seconds."""
        if seconds <= 0.0:
            return
        self._settle(self._now)
        start, cause = self._now, self.last
        # A worker may have the processor.
        if self._client.free > start:
            start, cause = self._client.free, self._client.last
        self.last = self._note(what, -1, start, start + seconds, cause)
        self._now = start + seconds
        self._client.free, self._client.last = self._now, self.last

    def _send(self, request: Request) -> _Sent:
        worker = min(request.workers, key=lambda w: (self._under_way[w], self._last_used[w]))
        self._count += 1
        self._under_way[worker] += 1
        self._last_used[worker] = self._count
        sent = _Sent(request, worker, self.last)
        self._at(self._now, 0, sent)
        return sent

    def _await(self, sent: _Sent) -> None:
        while sent.answered is None:
            self._next_event()
        self._under_way[sent.worker] -= 1
        if sent.answered > self._now:
            self._now, self.last = sent.answered, sent.cause

    def _settle(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self._next_event()

    def _next_event(self) -> None:
        time, _, stage, sent = heapq.heappop(self._events)
        if stage == 0:
            self._carry("uplink", time, sent.request.up, sent)
        elif stage == 1:
            resource = self._workers[sent.worker]
            start, cause = max((time, sent.cause), (resource.free, resource.last), key=lambda pair: pair[0])
            end = start + sent.request.evaluate
            sent.cause = self._note("evaluate", sent.worker, start, end, cause)
            resource.free, resource.last = end, sent.cause
            self._travel(end, 2, sent)
        elif stage == 2:
            self._carry("downlink", time, sent.request.down, sent)
        else:
            sent.answered = time

    def _carry(self, way: Literal["uplink", "downlink"], time: float, nbytes: int, sent: _Sent) -> None:
        """Pass a message through the client's card, at the speed of the slower of card and connection.

        A worker's own card, as fast as the client's, never holds up what the client's has let through.
        """
        card, connection = self._cards[way], self._connections[way][sent.worker]
        ready = ((time, sent.cause), (card.free, card.last), (connection.free, connection.last))
        start, cause = max(ready, key=lambda pair: pair[0])
        end = start + nbytes / min(self._network.card(way), self._network.rate)
        sent.cause = self._note(way, sent.worker, start, end, cause)
        card.free, card.last = start + nbytes / self._network.card(way), sent.cause
        connection.free, connection.last = end, sent.cause
        if way == "uplink":
            self._travel(end, 1, sent)
        else:
            self._at(end, 3, sent)

    def _travel(self, time: float, stage: int, sent: _Sent) -> None:
        """Carry a message that has left, or the first byte of one, over the network."""
        start, cause = time, sent.cause
        if self._turns is not None:
            start, cause = max((start, cause), (self._turns.free, self._turns.last), key=lambda pair: pair[0])
        for seconds, in_turn in ((self._network.overhead / 2, True), (self._network.latency, False)):
            if seconds > 0.0:
                cause = self._note("latency", sent.worker, start, start + seconds, cause)
                start += seconds
                if in_turn and self._turns is not None:
                    self._turns.free, self._turns.last = start, cause
        sent.cause = cause
        self._at(start, stage, sent)

    def _at(self, time: float, stage: int, sent: _Sent) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, stage, sent))

    def _note(self, what: What, worker: int, start: float, end: float, cause: int) -> int:
        self.activities.append(Activity(what, worker, start, end, cause))
        return len(self.activities) - 1
