"""Many clients at the workers of one model as a discrete-event model: a function of plain numbers.

Every client has a line of its own, and a processor of its own unless they share some. Workers are shared: a worker's
card takes one message in and one out at a time, and it evaluates one product at a time, each in the order of arrival.
It is a closed network of queues (Lazowska, Zahorjan, Graham and Sevcik: Quantitative System Performance, 1984, chapter
4): clients send their next request when the last is answered, so load follows speed, and no queue grows without
bound.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
import statistics
from collections.abc import Iterator, Sequence

from ciphertune.planning.simulation import MicroBatch, Product, Request

_WARM_UP = 1 / 3
_FEW = 30
"""With fewer whole passes of a kind than this, their seconds are told from the products that were done."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Products that a client has evaluated one after the other, as a micro-batch or one token of an answer.

    Attributes:
        batch: the products, and the client's own seconds.
        tokens: that it counts as.
        times: how often it follows itself.
        counted: whether its seconds are those that a client of this kind waits for.
    """

    batch: MicroBatch
    tokens: int
    times: int = 1
    counted: bool = True


@dataclasses.dataclass(frozen=True)
class Kind:
    """Clients that do the same.

    Attributes:
        name: of the kind.
        clients: how many.
        cycle: what each does, over and over.
        think: mean seconds of a pause before each cycle, exponentially distributed.
    """

    name: str
    clients: int
    cycle: tuple[Pass, ...]
    think: float = 0.0


@dataclasses.dataclass(frozen=True)
class Lines:
    """Networks.

    Attributes:
        up, down: bytes a second of each client's line.
        latency: seconds one way.
        worker: bytes a second of each worker's card, each way.
        processors: that all clients share, each computing for one client at a time; 0 where each has one of its own.
        with_workers: whether workers evaluate on the same ones.
    """

    up: float
    down: float
    latency: float
    worker: float
    processors: int = 0
    with_workers: bool = False


@dataclasses.dataclass(frozen=True)
class Waiting:
    """Seconds of a pass of one kind of client.

    Attributes:
        alone: with no other client.
        median, p99: among the others.
        tokens_per_second: of all clients of the kind together.
    """

    alone: float
    median: float
    p99: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Load:
    """Load of workers by clients.

    Attributes:
        kinds: by the names of kinds.
        evaluating, receiving, sending: share of the time that the busiest worker, and the card of one, is at it.
        bytes_per_second: up and down, of all clients together.
    """

    kinds: dict[str, Waiting]
    evaluating: float
    receiving: float
    sending: float
    bytes_per_second: float

    @property
    def busiest(self) -> str:
        """What has the least room left: ``evaluating``, ``receiving`` or ``sending``."""
        return max(("evaluating", "receiving", "sending"), key=lambda name: float(getattr(self, name)))


def simulate_clients(kinds: Sequence[Kind], workers: int, lines: Lines, requests: int, seed: int = 0) -> Load:
    """Simulate clients that share workers.

    Args:
        kinds: of clients.
        workers: that hold one copy of the model; ``Request.workers`` are their numbers.
        lines: between them.
        requests: to simulate; the first third warms up.
        seed: of pauses, and of where clients begin.
    """
    alone = {kind.name: _alone(kind, workers, lines) for kind in kinds}
    run = _Run(kinds, workers, lines, random.Random(seed))
    run.until(round(_WARM_UP * requests))
    run.forget()
    run.until(requests)
    return run.load(alone)


def _alone(kind: Kind, workers: int, lines: Lines) -> float:
    """Mean seconds of the passes that count, of a single client."""
    alone = _Run([dataclasses.replace(kind, clients=1, think=0.0)], workers, lines, None)
    count = sum(len(each.batch.products) * each.times for each in kind.cycle)
    alone.until(sum(len(p.requests) for each in kind.cycle for p in each.batch.products for _ in range(each.times)))
    assert count
    return statistics.fmean(alone.passes[kind.name] or [alone.now])


def _idle(product: Product, lines: Lines) -> float:
    """About the seconds of a product that nothing else delays."""
    slowest = max(
        (
            request.evaluate + request.up / min(lines.up, lines.worker) + request.down / min(lines.down, lines.worker)
            for request in product.requests
        ),
        default=0.0,
    )
    own = product.rest + sum(request.encrypt + request.decrypt for request in product.requests)
    return own + slowest + 2 * lines.latency


class _Client:
    """One client: where it is in its cycle, and what it waits for."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.steps = self._walk(0, 0)
        self.uplink = self.downlink = self.ready = 0.0
        self.missing = 0
        self.began = 0.0
        self.whole = False
        self.current: tuple[Pass, Product, bool, bool]

    def begin_at(self, position: int, product: int) -> None:
        self.steps = self._walk(position, product)

    def _walk(self, position: int, product: int) -> Iterator[tuple[Pass, Product, bool, bool, bool]]:
        """Each product with its pass; whether it is the first and the last of it, and the first of a cycle."""
        while True:
            index = 0
            for one in self.kind.cycle:
                products = one.batch.products
                for turn in range(one.times):
                    if index >= position:
                        for i in range(product, len(products)):
                            first = i == 0
                            yield one, products[i], first, i == len(products) - 1, first and index == 0 and not turn
                        product = 0
                    index += 1
            position = 0


class _Run:
    """A simulation under way."""

    def __init__(self, kinds: Sequence[Kind], workers: int, lines: Lines, chance: random.Random | None) -> None:
        self.now = 0.0
        self.passes: dict[str, list[float]] = {kind.name: [] for kind in kinds}
        self._kinds, self._lines, self._chance = kinds, lines, chance
        self._events: list[tuple[float, int, int, _Client, Request | None, int]] = []
        self._processors = [0.0] * lines.processors
        self._count = self._served = 0
        self._free = {what: [0.0] * workers for what in ("receiving", "evaluating", "sending")}
        self._under_way = [0] * workers
        self.forget()
        self._clients = [_Client(kind) for kind in kinds for _ in range(kind.clients)]
        for client in self._clients:
            start = 0.0
            if chance is not None:
                turns = sum(one.times for one in client.kind.cycle)
                products = client.kind.cycle[-1].batch.products
                client.begin_at(chance.randrange(turns), chance.randrange(len(products)))
                start = chance.random() * (client.kind.think + products[0].rest)
            self._next(client, start)

    def forget(self) -> None:
        """Begin to count."""
        self._since = self.now
        self._busy = {what: [0.0] * len(free) for what, free in self._free.items()}
        self._tokens = dict.fromkeys((kind.name for kind in self._kinds), 0.0)
        self._done: dict[int, float] = {}
        self._bytes = 0
        for kind in self._kinds:
            self.passes[kind.name] = []

    def until(self, requests: int) -> None:
        """Go on until so many requests were served in all."""
        while self._served < requests and self._events:
            time, _, stage, client, request, worker = heapq.heappop(self._events)
            self.now = time
            if request is None:
                self._send(client, time)
            elif stage == 0:
                self._use("receiving", time, request.up / self._lines.worker, client, request, worker)
            elif stage == 1:
                self._use("evaluating", time, request.evaluate, client, request, worker)
            elif stage == 2:
                self._use("sending", time, request.down / self._lines.worker, client, request, worker)
            elif stage == 3:
                client.downlink = max(time, client.downlink) + request.down / self._lines.down
                self._at(client.downlink, 4, client, request, worker)
            else:
                self._answered(client, request, time)

    def load(self, alone: dict[str, float]) -> Load:
        """The load since ``forget``."""
        seconds = max(self.now - self._since, 1e-12)
        found = {}
        for kind in self._kinds:
            passes = sorted(self.passes[kind.name])
            if len(passes) < _FEW and not kind.think:
                passes = sorted(self._told(kind, seconds))
            passes = passes or [alone[kind.name]]
            at = min(len(passes) - 1, math.ceil(0.99 * len(passes)) - 1)
            found[kind.name] = Waiting(
                alone[kind.name], statistics.median(passes), passes[at], self._tokens[kind.name] / seconds
            )
        shares = {what: min(1.0, max(busy) / seconds) for what, busy in self._busy.items()}
        return Load(found, **shares, bytes_per_second=self._bytes / seconds)

    def _told(self, kind: Kind, seconds: float) -> list[float]:
        """Seconds of a pass of each client, from what it got done of it, each product as long as alone."""
        counted = [one for one in kind.cycle if one.counted]
        each = statistics.fmean(sum(_idle(p, self._lines) for p in one.batch.products) for one in counted)
        done = [self._done.get(id(client), 0.0) for client in self._clients if client.kind is kind]
        return [seconds * each / part for part in done if part]

    def _next(self, client: _Client, now: float) -> None:
        one, product, first, last, fresh = next(client.steps)
        if fresh and self._chance is not None and client.kind.think:
            now += self._chance.expovariate(1.0 / client.kind.think)
        if first:
            client.began, client.whole = now, True
        client.current = one, product, last, client.whole
        self._at(now, -1, client, None, -1)

    def _send(self, client: _Client, now: float) -> None:
        """Compute up to a product, and send its requests."""
        product = client.current[1]
        own = product.rest + sum(request.encrypt for request in product.requests)
        time = self._compute(client, now, own) - own + product.rest
        client.missing = len(product.requests)
        for request in product.requests:
            time += request.encrypt
            client.uplink = max(time, client.uplink) + request.up / self._lines.up
            worker = min(request.workers, key=self._under_way.__getitem__)
            self._under_way[worker] += 1
            self._at(client.uplink + self._lines.latency, 0, client, request, worker)

    def _compute(self, client: _Client, now: float, seconds: float) -> float:
        """When a client has computed for some seconds, on its own processor or on the first that is free."""
        client.ready = max(now, client.ready)
        if not self._processors:
            client.ready += seconds
        elif seconds:
            client.ready = self._on_one(client.ready, seconds)
        return client.ready

    def _on_one(self, now: float, seconds: float) -> float:
        first = min(range(len(self._processors)), key=self._processors.__getitem__)
        end = self._processors[first] = max(now, self._processors[first]) + seconds
        return end

    def _use(self, what: str, time: float, seconds: float, client: _Client, request: Request, worker: int) -> None:
        free = self._free[what]
        begin = max(time, free[worker])
        shared = what == "evaluating" and self._lines.with_workers and self._processors
        end = free[worker] = self._on_one(begin, seconds) if shared else begin + seconds
        if what == "evaluating" and request.after:
            free[worker] = self._on_one(end, request.after) if shared else end + request.after
            seconds += request.after
        self._busy[what][worker] += seconds
        if what == "sending":
            self._under_way[worker] -= 1
            end += self._lines.latency
        self._at(end, {"receiving": 1, "evaluating": 2, "sending": 3}[what], client, request, worker)

    def _answered(self, client: _Client, request: Request, time: float) -> None:
        self._compute(client, time, request.decrypt)
        self._served += 1
        self._bytes += request.up + request.down
        client.missing -= 1
        if client.missing:
            return
        one, product, last, whole = client.current
        self._tokens[client.kind.name] += one.tokens / len(one.batch.products)
        if one.counted:
            self._done[id(client)] = self._done.get(id(client), 0.0) + _idle(product, self._lines)
        end = client.ready
        if last:
            end = self._compute(client, end, one.batch.rest)
            if whole and one.counted:
                self.passes[client.kind.name].append(end - client.began)
        self._next(client, end)

    def _at(self, time: float, stage: int, client: _Client, request: Request | None, worker: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, stage, client, request, worker))
