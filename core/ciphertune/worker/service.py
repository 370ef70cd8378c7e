"""A worker open to many clients: quotas, fair turns, expiry of sessions, draining. Knows no transport."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ciphertune._support.version import __version__
from ciphertune.errors import ProtocolError, VersionError
from ciphertune.protocol import DEFAULT_LIMITS, Frame, Limits, Message, error_message, pack, unpack
from ciphertune.transport import Reply
from ciphertune.worker.worker import Worker

log = logging.getLogger(__name__)

_EXPIRY_SECONDS = 1.0
_INSTANT = ("hello", "stats")
"""Answered where they arrive: handing them to a thread would take longer."""
_SHOWN_SECONDS = 1.0
_WINDOW_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Quota:
    """What one client may have under way at a time, replies that it has not taken included.

    Attributes:
        requests: number of them.
        nbytes: bytes of requests and replies together. A single request is always taken, within ``Limits``.
    """

    requests: int = 64
    nbytes: int = 2 << 30


@dataclasses.dataclass
class _Job:
    request: Message
    nbytes: int
    reply: Reply
    arrived: float


@dataclasses.dataclass
class Usage:
    """Answered products, errors among the answers, their bytes and those of requests, and seconds of evaluation."""

    products: int = 0
    errors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    evaluate_seconds: float = 0.0


@dataclasses.dataclass
class _Client:
    """One client's queue, what it has under way, and its share of the evaluator's time so far."""

    peer: str
    jobs: collections.deque[_Job] = dataclasses.field(default_factory=collections.deque)
    requests: int = 0
    nbytes: int = 0
    virtual_time: float = 0.0
    last_seen: float = 0.0
    own: Usage = dataclasses.field(default_factory=Usage)


@dataclasses.dataclass
class ServiceStats:
    """Counters since the service started, for metrics and logs.

    Attributes:
        requests, errors: by kind of request, and by error code.
        bytes_in, bytes_out: of messages, headers included.
        queue_seconds, evaluate_seconds, pack_seconds: time requests waited, were answered, and were made into frames.
        expired: sessions closed for idleness.
    """

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    queue_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    pack_seconds: float = 0.0
    expired: int = 0


@dataclasses.dataclass(frozen=True)
class Load:
    """What is going on now: queued requests, requests under way, their bytes, clients and sessions."""

    queued: int
    under_way: int
    nbytes: int
    clients: int
    sessions: int


class Service:
    """Takes requests of many clients and has a worker answer them in fair turns.

    Products are evaluated on threads of their own, one at a time unless told otherwise, since each uses every core.
    The next product is that of the client that used least evaluation time so far among those that wait (start-time
    fair queueing: Goyal, Vin, Cheng, SIGCOMM 1996, section 2), so one with many requests, or large ones, delays others
    by one product at most. Everything else is answered on another thread and never waits for a product.

    Args:
        worker: what answers.
        quota: of every client.
        limits: what a message may be.
        evaluators: products evaluated at the same time.
    """

    def __init__(
        self, worker: Worker, quota: Quota | None = None, limits: Limits = DEFAULT_LIMITS, evaluators: int = 1
    ) -> None:
        self.worker = worker
        self.quota = quota if quota is not None else Quota()
        self.limits = limits
        self.stats = ServiceStats()
        self.started = time.time()
        self.evaluators = evaluators
        self._clients: dict[str, _Client] = {}
        self._quick: collections.deque[tuple[_Client, _Job]] = collections.deque()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._quick_work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._under_way = 0
        self._clock = 0.0
        self._draining = False
        self._stopped = False
        self._done = Usage()
        self._evaluating: dict[int, float] = {}  # by thread, since when
        self._samples: collections.deque[tuple[float, Usage]] = collections.deque([(time.monotonic(), Usage())])
        self._shown: tuple[float, dict[str, Any]] = (-math.inf, {})
        self._threads = [
            threading.Thread(target=self._evaluate_loop, name=f"ciphertune-evaluate-{i}", daemon=True)
            for i in range(evaluators)
        ]
        self._threads.append(threading.Thread(target=self._quick_loop, name="ciphertune-control", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, frames: Sequence[Frame], peer: str, reply: Reply) -> None:
        """Take a request; see ``ciphertune.transport.RequestHandler``."""
        nbytes = sum(len(frame) for frame in frames)
        job = _Job(Message("hello"), nbytes, reply, time.monotonic())
        try:
            job.request = unpack(frames, self.limits)
        except ProtocolError as error:
            code = "version" if isinstance(error, VersionError) else "protocol"
            self._answer(None, job, error_message(code, str(error)), "malformed")
            return
        kind = job.request.kind
        if kind == "stats" or (kind in _INSTANT and not self._draining):
            with self._lock:
                self.stats.bytes_in += nbytes
            message = self._tell(job.request, peer) if kind == "stats" else self.worker.handle(job.request, peer)
            self._answer(None, job, message, kind)
            return
        refusal = ""
        with self._lock:
            client = self._clients.setdefault(peer, _Client(peer))
            client.last_seen = job.arrived
            if self._draining:
                refusal = "this worker is shutting down"
            elif client.requests >= self.quota.requests:
                refusal = f"{client.requests} requests of this client are under way, and no more may be"
            elif client.requests and client.nbytes + nbytes > self.quota.nbytes:
                refusal = f"requests of this client hold {client.nbytes} bytes, of {self.quota.nbytes} it may have"
            else:
                client.requests += 1
                client.nbytes += nbytes
                self._under_way += 1
                self.stats.bytes_in += nbytes
                if job.request.kind == "evaluate":
                    if not client.jobs:
                        # Who was away saves up no time to use at once.
                        client.virtual_time = max(client.virtual_time, self._clock)
                    client.jobs.append(job)
                    self._work.notify()
                else:
                    self._quick.append((client, job))
                    self._quick_work.notify()
        if refusal:
            self._answer(None, job, error_message("busy", refusal), job.request.kind)

    @property
    def load(self) -> Load:
        """What is going on now."""
        with self._lock:
            clients = list(self._clients.values())
            queued = sum(len(client.jobs) for client in clients) + len(self._quick)
            nbytes = sum(client.nbytes for client in clients)
            return Load(queued, self._under_way, nbytes, len(clients), self.worker.sessions)

    def figures(self, peer: str) -> dict[str, Any]:
        """What the client ``peer`` may know of this worker: its own use exactly, and that of all roughly.

        A client must not learn of another one more than load. So what is of all clients is taken once a second at most,
        however often it is asked for; ``busy`` and the rates are means of the last ten seconds or so, in steps of 1 %
        and of 1 MB/s, too coarse to tell single requests; and products are not counted for others, or their number
        and the rates together would tell how large they are.
        """
        worker = self.worker
        sessions = worker.sessions_of(peer)
        with self._lock:
            now = time.monotonic()
            if now >= self._shown[0] + _SHOWN_SECONDS:
                self._shown = now, self._measure(now)
            client = self._clients.get(peer)
            own = dataclasses.asdict(client.own) if client is not None else dataclasses.asdict(Usage())
            under_way = client.requests if client is not None else 0
            return {
                "version": __version__,
                "device": str(worker.device),
                "layers": len(worker.weights),
                "weight_bytes": worker.weights.nbytes,
                "evaluators": self.evaluators,
                "draining": self._draining,
                **self._shown[1],
                "own": {"sessions": sessions, "under_way": under_way, **own},
            }

    def _tell(self, request: Message, peer: str) -> Message:
        return Message("ok", self.figures(peer), version=request.version)

    def _measure(self, now: float) -> dict[str, Any]:
        """What all clients are told of all clients; the caller holds the lock."""
        total, (then, before) = self._sample(now), self._samples[0]
        # Right after the start too, or the first request of all could be told from its rate.
        seconds = max(now - then, _WINDOW_SECONDS)
        busy = (total.evaluate_seconds - before.evaluate_seconds) / seconds / self.evaluators
        clients = list(self._clients.values())
        return {
            "uptime_seconds": int(time.time() - self.started),
            "sessions": self.worker.sessions,
            "clients": len(clients),
            "queued": sum(len(client.jobs) for client in clients) + len(self._quick),
            "under_way": self._under_way,
            "busy": min(1.0, round(busy, 2)),
            "bytes_in_per_second": _rough((total.bytes_in - before.bytes_in) / seconds),
            "bytes_out_per_second": _rough((total.bytes_out - before.bytes_out) / seconds),
        }

    def _sample(self, now: float) -> Usage:
        """All that was done so far, and kept for a while; the caller holds the lock."""
        running = sum(now - since for since in self._evaluating.values())
        usage = dataclasses.replace(self._done, evaluate_seconds=self._done.evaluate_seconds + running)
        if now - self._samples[-1][0] >= _SHOWN_SECONDS:
            self._samples.append((now, usage))
            # The first is the last that is old enough.
            while len(self._samples) > 1 and self._samples[1][0] <= now - _WINDOW_SECONDS:
                self._samples.popleft()
        return usage

    def drain(self, timeout: float) -> bool:
        """Refuse new requests, as busy, and wait until those under way are answered and gone.

        Returns:
            Whether nothing is under way any more.
        """
        with self._lock:
            self._draining = True
            return self._idle.wait_for(lambda: self._under_way == 0, timeout)

    def close(self) -> None:
        """Stop the threads; requests that still wait get no answer. Idempotent."""
        with self._lock:
            self._draining = self._stopped = True
            self._work.notify_all()
            self._quick_work.notify_all()
        for thread in self._threads:
            thread.join()

    def _evaluate_loop(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(lambda: self._stopped or any(c.jobs for c in self._clients.values()))
                if self._stopped:
                    return
                client = min((c for c in self._clients.values() if c.jobs), key=lambda c: c.virtual_time)
                job = client.jobs.popleft()
                self._clock = client.virtual_time
                self.stats.queue_seconds += time.monotonic() - job.arrived
                start = time.monotonic()
                self._evaluating[threading.get_ident()] = start
            message = self.worker.handle(job.request, client.peer)
            seconds = time.monotonic() - start
            with self._lock:
                del self._evaluating[threading.get_ident()]
                client.own.evaluate_seconds += seconds
                self._done.evaluate_seconds += seconds
                client.virtual_time += seconds
                self.stats.evaluate_seconds += seconds
            self._answer(client, job, message, "evaluate")

    def _quick_loop(self) -> None:
        expiry = time.monotonic() + _EXPIRY_SECONDS
        while True:
            with self._lock:
                self._quick_work.wait_for(
                    lambda: self._stopped or bool(self._quick), max(0.0, expiry - time.monotonic())
                )
                if self._stopped:
                    return
                taken = self._quick.popleft() if self._quick else None
            if taken is not None:
                client, job = taken
                self._answer(client, job, self.worker.handle(job.request, client.peer), job.request.kind)
            if time.monotonic() >= expiry:
                self._expire()
                expiry = time.monotonic() + _EXPIRY_SECONDS

    def _answer(self, client: _Client | None, job: _Job, message: Message, kind: str) -> None:
        start = time.monotonic()
        try:
            frames = pack(message)
        except Exception as error:
            # A backend that returns what cannot travel must not take this thread with it.
            log.error("a reply to %s cannot be sent", kind, exc_info=error)
            message = error_message("internal", "the worker's reply cannot be sent")
            frames = pack(message)
        nbytes = sum(len(frame) for frame in frames)
        with self._lock:
            self.stats.requests[kind] += 1
            if message.kind == "error":
                self.stats.errors[str(message.fields["code"])] += 1
            self.stats.bytes_out += nbytes
            self.stats.pack_seconds += time.monotonic() - start
            if client is not None:
                client.nbytes += nbytes - job.nbytes
                for usage in (client.own, self._done):
                    usage.products += kind == "evaluate"
                    usage.errors += message.kind == "error"
                    usage.bytes_in += job.nbytes
                    usage.bytes_out += nbytes
        # The request's memory goes with it; the reply's once it has left.
        job.request = Message("hello")
        job.reply(frames, self._releaser(client, nbytes))

    def _releaser(self, client: _Client | None, nbytes: int) -> Callable[[], None]:
        once = threading.Lock()

        def release() -> None:
            if client is None or not once.acquire(blocking=False):
                return
            with self._lock:
                client.requests -= 1
                client.nbytes -= nbytes
                self._under_way -= 1
                if self._under_way == 0:
                    self._idle.notify_all()

        return release

    def _expire(self) -> None:
        expired = self.worker.expire()
        oldest = time.monotonic() - self.worker.limits.idle_seconds
        with self._lock:
            self.stats.expired += expired
            self._sample(time.monotonic())
            for peer in [c.peer for c in self._clients.values() if not c.requests and c.last_seen < oldest]:
                del self._clients[peer]
        if expired:
            log.info("closed %d idle sessions", expired)


def _rough(rate: float) -> int:
    """Bytes a second in whole megabytes, to two digits.

    >>> _rough(1234567890.0), _rough(1_700_000.0), _rough(400_000.0)
    (1200000000, 2000000, 0)
    """
    return int(float(f"{round(rate / 1e6):.2g}") * 1e6)
