"""A worker open to many clients: fair turns, expiry of sessions, draining. Knows no transport."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from ciphertune._support.turns import LONG, take_turns
from ciphertune._support.version import __version__
from ciphertune.errors import ProtocolError, VersionError
from ciphertune.protocol import DEFAULT_LIMITS, Frame, Limits, Message, error_message, pack, unpack
from ciphertune.status import ClientUsage, WorkerStatus
from ciphertune.transport import Reply
from ciphertune.worker.counters import Counters, Load
from ciphertune.worker.disclosure import Disclosure, Totals
from ciphertune.worker.queueing import Client, FairQueue, Job, Quota
from ciphertune.worker.refusals import Refusals
from ciphertune.worker.worker import Worker

log = logging.getLogger(__name__)

_EXPIRY_SECONDS = 1.0
_TELL_SECONDS = 5.0
# Opening a session prepares weights, which may take minutes.
_SILENCE_SECONDS = 900.0
_NO_REQUEST = Message("hello")


class Waiting(NamedTuple):
    """What a worker that is about to stop waits for.

    Attributes:
        evaluated, queued: requests that are evaluated, and that wait.
        replies: that clients have not taken yet.
        clients: whose they are.
        seconds: left until it waits no longer.
    """

    evaluated: int
    queued: int
    replies: int
    clients: int
    seconds: float


@dataclasses.dataclass
class _Running:
    """Products that a thread evaluates at once.

    Attributes:
        turn: the products and their clients.
        since: from when on their evaluation is not counted yet.
        beside: what is evaluated on other threads that give way to it.
    """

    turn: list[tuple[Client, Job]]
    since: float
    beside: Sequence[_Running] = ()


class Service:
    """Request handler of a transport: takes requests of many clients and has a worker answer them in fair turns.

    Products are evaluated on threads of their own, one at a time unless told otherwise, since each uses every core;
    ``FairQueue`` says which is next, which are evaluated together, and which in the course of a larger one. A short one
    is evaluated on the thread that it came on, if that is idle, and no other product waits or is evaluated (to wake
    another thread takes as long), or larger ones are: the system interrupts these at once, where it knows how to.
    Others are evaluated in the pauses of a larger one. Everything else is answered on another thread and never waits
    for a product.

    Args:
        worker: what answers.
        quota: of every client.
        limits: what a message may be.
        evaluators: products evaluated at the same time.
        clock: seconds, as ``time.monotonic``.

    Attributes:
        worker, limits, evaluators: as given.
        counters: sums since the start.
        refusals: connections, and requests for sessions, that were refused.
    """

    def __init__(
        self,
        worker: Worker,
        quota: Quota | None = None,
        limits: Limits = DEFAULT_LIMITS,
        evaluators: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.limits = limits
        self.evaluators = evaluators
        self.counters = Counters()
        self.refusals = Refusals(clock)
        self._clock = clock
        self._started = self._ticked = clock()
        self._products = FairQueue(quota if quota is not None else Quota())
        self._quick: collections.deque[tuple[Client, Job]] = collections.deque()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._quick_work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._draining = False
        self._stopped = False
        # By thread that evaluates: as many as ``evaluators``, and one more for short products beside larger ones.
        self._running: dict[int, _Running] = {}
        self._evaluating = 0
        self._disclosure = Disclosure(evaluators, self._started)
        self._threads = [
            threading.Thread(target=self._evaluate_loop, name=f"ciphertune-evaluate-{i}", daemon=True)
            for i in range(evaluators)
        ]
        self._threads.append(threading.Thread(target=self._quick_loop, name="ciphertune-control", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(
        self, frames: Sequence[Frame], peer: str, reply: Reply, connection: Hashable = None, *, idle: bool = False
    ) -> None:
        """Take a request; see ``ciphertune.transport.RequestHandler``."""
        job = Job(_NO_REQUEST, sum(map(len, frames)), reply, self._clock(), connection=connection)
        try:
            job.request = unpack(frames, self.limits)
        except ProtocolError as error:
            code = "version" if isinstance(error, VersionError) else "protocol"
            self._answer(None, job, error_message(code, str(error)), "malformed")
            return
        kind = job.request.kind
        if (session := job.request.fields.get("session")) is not None:
            self.worker.opened.seen(str(session), peer, connection)
        # These two are answered where they arrive: handing them to a thread would take longer.
        if kind == "stats":
            told = Message("ok", self.status(peer).fields(), version=job.request.version)
            self._answer(None, job, told, kind)
        elif kind == "hello" and not self._draining:
            self._answer(None, job, self.worker.handle(job.request, peer), kind)
        else:
            refused, turn = self._enqueue(peer, job, idle)
            if refused is not None:
                self._answer(None, job, refused, kind)
            elif turn:
                self._evaluate(turn)

    def left(self, peer: str, connection: Hashable) -> None:
        """Take notice of a connection that has ended; see ``ciphertune.transport.RequestHandler``."""
        self.worker.opened.left(peer, connection)

    def dismiss(self, peer: str) -> None:
        """End a client's sessions; see ``ciphertune.transport.RequestHandler``."""
        sessions = self.worker.dismiss(peer)
        log.warning("client revoked", extra={"fields": {"client": peer, "sessions": sessions}})

    def refused(self, peer: str, why: str) -> None:
        """Count a refusal; see ``ciphertune.transport.RequestHandler``."""
        self.refusals.note(peer, why)

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None] | None:
        """Count a request that has yet to be received; see ``ciphertune.transport.RequestHandler``."""
        with self._lock:
            client = self._products.client(peer, self._clock())
            if self._draining or self._products.refusal(client, nbytes):
                return None
            self._products.admit(client, nbytes)
        return self._releaser(client, nbytes)

    @property
    def quota(self) -> Quota:
        """What each client may have under way; it may be replaced."""
        return self._products.quota

    @quota.setter
    def quota(self, quota: Quota) -> None:
        with self._lock:
            self._products.quota = quota

    @property
    def load(self) -> Load:
        """Load of this moment."""
        with self._lock:
            return self._load()

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def status(self, peer: str) -> WorkerStatus:
        """Status as the client ``peer`` may know it: its own use exactly, all clients' as ``Disclosure`` says."""
        worker = self.worker
        sessions = worker.sessions_of(peer)
        with self._lock:
            client = self._products.clients.get(peer)
            own = client.counters if client is not None else Counters()
            return WorkerStatus(
                version=__version__,
                device=str(worker.device),
                layers=worker.held.layers,
                weight_bytes=worker.held.nbytes,
                evaluators=self.evaluators,
                draining=self._draining,
                **self._disclosure.figures(self._totals(), self._load()),
                own=ClientUsage(
                    sessions=sessions,
                    under_way=client.requests if client is not None else 0,
                    products=own.products,
                    errors=own.errors.total(),
                    bytes_in=own.bytes_in,
                    bytes_out=own.bytes_out,
                    evaluate_seconds=own.evaluate_seconds,
                ),
            )

    @property
    def draining(self) -> bool:
        """Whether it refuses new requests because it is about to stop."""
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether its threads run, and the one that answers all but products did so within the last seconds."""
        ticking = self._clock() - self._ticked < _SILENCE_SECONDS
        return ticking and all(thread.is_alive() for thread in self._threads)

    def drain(self, timeout: float, tell: Callable[[Waiting], object] = lambda _: None) -> bool:
        """Refuse new requests, as busy, and wait until those under way are answered and gone.

        Args:
            timeout: seconds to wait at most.
            tell: called with what it waits for, at once and every few seconds.

        Returns:
            Whether nothing is under way any more.
        """
        end = self._clock() + timeout
        while True:
            with self._lock:
                self._draining = True
                if self._products.under_way == 0:
                    return True
                waiting = self._waiting(end - self._clock())
            tell(waiting)
            if waiting.seconds <= 0:
                return False
            with self._lock:
                self._idle.wait_for(lambda: self._products.under_way == 0, min(_TELL_SECONDS, waiting.seconds))

    def close(self, timeout: float | None = None) -> bool:
        """Stop the threads; requests that still wait get no answer. Idempotent.

        Args:
            timeout: seconds to wait at most for products that are evaluated; None to wait until they are.

        Returns:
            Whether the threads have ended.
        """
        with self._lock:
            self._draining = self._stopped = True
            self._work.notify_all()
            self._quick_work.notify_all()
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        with self._lock:
            # On threads of the listener, too.
            evaluated = self._work.wait_for(
                lambda: not self._running, None if end is None else max(0.0, end - time.monotonic())
            )
        return evaluated and not any(thread.is_alive() for thread in self._threads)

    def _enqueue(self, peer: str, job: Job, idle: bool) -> tuple[Message | None, list[tuple[Client, Job]]]:
        """Queue a request with its reply's bytes reserved.

        Args:
            peer: the client.
            job: the request.
            idle: whether it may be evaluated on this thread.

        Returns:
            The error with which it is refused, if it is; and what this thread is to evaluate now.
        """
        product = job.request.kind == "evaluate"
        reply_bytes, short = self.worker.foresee(job.request, peer)
        most = min(self._products.quota.nbytes, self.limits.total_bytes)
        # A reading's size is a bound, which small quotas need not hold.
        if product and reply_bytes > most:
            text = f"the reply would have {reply_bytes} bytes, and this worker sends a client {most} at most"
            return error_message("quota", f"{text}: ask for fewer tokens at a time"), []
        job.reserved = job.nbytes + reply_bytes
        here = idle and short
        if product and not (here and self._free):
            job.joint = self.worker.joint(job.request, peer)
        with self._lock:
            client = self._products.client(peer, job.arrived)
            if self._draining:
                return error_message("busy", "this worker is shutting down"), []
            if refusal := self._products.refusal(client, job.reserved):
                return error_message("busy", refusal), []
            self._products.admit(client, job.reserved)
            if product:
                free = self._free
                self._products.push(client, job)
                if here and free:
                    return None, self._begin(self._products.pop())
                if here and (first := self._pop_beside(client)) is not None:
                    return None, self._begin(first, list(self._running.values()))
                self._work.notify()
            else:
                self._quick.append((client, job))
                self._quick_work.notify()
            return None, []

    @property
    def _free(self) -> bool:
        """Whether no product waits or is evaluated."""
        return not self._running and not self._products

    def _pop_beside(self, client: Client) -> tuple[Client, Job] | None:
        """The product of a client that this thread may evaluate beside larger ones; the caller holds the lock."""
        for running in self._running.values():
            self._account(running)
        return self._products.pop_beside(client, [each for running in self._running.values() for each in running.turn])

    def _waiting(self, seconds: float) -> Waiting:
        """What a drain waits for; the caller holds the lock."""
        queued, running = len(self._products) + len(self._quick), self._evaluating
        clients = sum(client.requests > 0 for client in self._products.clients.values())
        under_way = self._products.under_way
        return Waiting(running, queued, max(0, under_way - queued - running), clients, max(0.0, seconds))

    def _load(self) -> Load:
        """Load of this moment; the caller holds the lock."""
        products = self._products
        queued = len(products) + len(self._quick)
        return Load(queued, products.under_way, products.nbytes, len(products.clients), self.worker.sessions)

    def _totals(self) -> Totals:
        """Sums up to this moment; the caller holds the lock."""
        now, sums = self._clock(), self.counters
        running = sum(now - each.since for each in self._running.values())
        return Totals(now, sums.evaluate_seconds + running, sums.bytes_in, sums.bytes_out)

    def _evaluate_loop(self) -> None:
        # What other threads do takes a moment, short products included.
        take_turns(LONG)
        while True:
            with self._lock:
                self._work.wait_for(
                    lambda: self._stopped or (bool(self._products) and len(self._running) < self.evaluators)
                )
                if self._stopped:
                    return
                turn = self._begin(self._products.pop())
            self._evaluate(turn)

    def _begin(self, first: tuple[Client, Job], beside: Sequence[_Running] = ()) -> list[tuple[Client, Job]]:
        """What is evaluated together with a product that was popped, itself first; the caller holds the lock."""
        turn = [first, *self._products.pop_joint(first[1])]
        now = self._clock()
        self._running[threading.get_ident()] = _Running(turn, now, beside)
        self._evaluating += len(turn)
        for client, job in turn:
            for counters in (self.counters, client.counters):
                counters.queue_seconds += now - job.arrived
                counters.joined += len(turn) > 1
        return turn

    def _evaluate(self, turn: list[tuple[Client, Job]], paused: bool = False) -> None:
        """Evaluate products that were begun, and answer them; ``paused``: in the course of another one."""
        if len(turn) == 1:
            ((client, job),) = turn
            # Parts cost a little, for nothing where nobody else is there.
            pause = (lambda: self._pause(client, job)) if len(self._products.clients) > 1 else None
            messages = [self.worker.handle(job.request, client.peer, pause)]
        else:
            messages = self.worker.handle_together([(job.request, client.peer) for client, job in turn])
        with self._lock:
            running = self._running[threading.get_ident()]
            seconds = self._account(running)
            for other in running.beside:
                other.since = min(other.since + seconds, running.since)
            self._evaluating -= len(turn)
            for client, job in turn:
                self._products.ended(client, job)
            if not paused:
                del self._running[threading.get_ident()]
                if self._stopped:
                    self._work.notify_all()
                elif self._products:
                    self._work.notify()
        for (client, job), message in zip(turn, messages, strict=True):
            self._answer(client, job, message, "evaluate")

    def _pause(self, client: Client, job: Job) -> None:
        """Evaluate small products of others in the course of a large one."""
        running = self._running[threading.get_ident()]
        while True:
            with self._lock:
                self._account(running)
                small = None if self._stopped else self._products.pop_within(client, job)
                turn = None if small is None else self._begin(small)
            if turn is None:
                return
            self._evaluate(turn, paused=True)
            with self._lock:
                running.since = self._clock()
                self._running[threading.get_ident()] = running

    def _account(self, running: _Running) -> float:
        """Charge clients for what a thread evaluated since it was done last; its seconds. The caller holds the lock."""
        now = self._clock()
        seconds, running.since = now - running.since, now
        sizes = [job.joint.size if job.joint is not None else 1 for _, job in running.turn]
        for (client, job), size in zip(running.turn, sizes, strict=True):
            own = seconds * size / sum(sizes)
            self._products.charge(client, job, own)
            for counters in (self.counters, client.counters):
                counters.evaluate_seconds += own
        return seconds

    def _quick_loop(self) -> None:
        expiry = self._clock() + _EXPIRY_SECONDS
        while True:
            with self._lock:
                self._quick_work.wait_for(lambda: self._stopped or bool(self._quick), max(0.0, expiry - self._clock()))
                if self._stopped:
                    return
                taken = self._quick.popleft() if self._quick else None
            if taken is not None:
                self._answer_quickly(*taken)
            if self._clock() >= expiry:
                self._ticked = self._clock()
                self._expire()
                expiry = self._clock() + _EXPIRY_SECONDS

    def _answer_quickly(self, client: Client, job: Job) -> None:
        kind = job.request.kind
        message = self.worker.handle(job.request, client.peer)
        if kind == "open" and message.kind == "ok":
            self.worker.opened.seen(message.fields["session"], client.peer, job.connection)
        elif kind == "open":
            self.refusals.note(client.peer, f"no session: {message.fields['code']}")
        self._answer(client, job, message, kind)

    def _answer(self, client: Client | None, job: Job, message: Message, kind: str) -> None:
        start = self._clock()
        try:
            frames = pack(message)
        except Exception as error:
            # A backend that returns what cannot travel must not take this thread with it.
            log.error("a reply to %s cannot be sent", kind, exc_info=error)
            message = error_message("internal", "the worker's reply cannot be sent")
            frames = pack(message)
        nbytes = sum(len(frame) for frame in frames)
        with self._lock:
            seconds = self._clock() - start
            self.counters.count(kind, job.nbytes, message, nbytes, seconds)
            if client is not None:
                client.nbytes += nbytes - job.reserved
                client.counters.count(kind, job.nbytes, message, nbytes, seconds)
        # Before the answer leaves: its client may close the session with the next request.
        if client is not None and kind == "evaluate":
            used = str(job.request.fields.get("session"))
            self.worker.opened.count(used, client.peer, (job.nbytes, nbytes), job.seconds, message.kind == "error")
        # The request's memory goes with it; the reply's once it has left.
        job.request = _NO_REQUEST
        job.reply(frames, self._releaser(client, nbytes))

    def _releaser(self, client: Client | None, nbytes: int) -> Callable[[], None]:
        once = threading.Lock()

        def release() -> None:
            if client is None or not once.acquire(blocking=False):
                return
            with self._lock:
                self._products.release(client, nbytes)
                if self._products.under_way == 0:
                    self._idle.notify_all()

        return release

    def _expire(self) -> None:
        expired = self.worker.expire()
        with self._lock:
            self.counters.expired += expired
            self._disclosure.sample(self._totals())
            self._products.forget(self._clock() - self.worker.limits.idle_seconds)
        if expired:
            log.info("idle sessions closed", extra={"fields": {"sessions": expired}})
