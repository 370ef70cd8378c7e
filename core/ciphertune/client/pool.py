"""All workers of one session: what each of them holds, which is asked next, and which join later."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ciphertune.backend import Direction
from ciphertune.client.connection import LONGEST_BACKOFF_SECONDS, Opening, Retry, WorkerConnection, backoff
from ciphertune.client.exclusions import Exclusion, Exclusions
from ciphertune.client.placement import Piece, fitting, place
from ciphertune.errors import CipherTuneError, RefusedError, SecurityError, TransportError, UnknownLayerError
from ciphertune.protocol import Message
from ciphertune.selection import Timeouts
from ciphertune.transport import Link
from ciphertune.weights import LayerInfo

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 2.0
"""Time that workers have to take notice of the end of a session; less where ``Timeouts.timeout`` is less."""

_ASKED_NO_MORE = "; it is asked no more"
_KEPT = ", in later runs neither: 'ciphertune excluded' shows it"

JoiningWorkers = Callable[[Sequence[Link]], Sequence[Link]]
"""Opens links to workers that have joined, given the links that are open."""


ExclusionWatch = Callable[[str, tuple[str, ...], Direction], None]
SilenceWatch = Callable[[str, str | None, float], None]
"""Called with a worker's name, what went wrong or None for one that is back, and seconds: left to it, or of silence."""


class WorkerPool:
    """Sessions with every worker that serves some of a model's layers.

    Args:
        links: a connection to every worker; they stay the caller's until the pool is made.
        groups: the layers of each group of the client's session.
        opening: what opens a session.
        timeouts: how long to wait for workers.
        joining: asked for workers that have joined, on a thread of its own; None where none ever do.
        joining_seconds: how often it is asked.
        remote: whether workers are in other processes.
        model: digest of the model, hexadecimal: by it and its address a worker is known that proves no identity.
        excluded: told of a worker that gave a wrong answer: its name, the layers and the direction.
        silence: told of a worker that stops answering, and of one that answers again.
        clock: seconds, as ``time.monotonic``; by it failing workers are left alone.

    Attributes:
        workers: those known so far; ``Piece.workers`` are indices into them.
        opening, timeouts: as given.
        closed: set once the pool is closed.
        wrong: what this session found to be answered wrongly, once for each worker.

    Raises:
        SecurityError: a worker that is needed gave wrong answers before, and is excluded.
        TransportError: workers that are needed cannot be reached, or do not let this client in.
        UnknownLayerError: together they do not hold every layer with the weights that this client expects.
        WorkerError, ReplyError: one refused, or answered nonsense.
    """

    def __init__(
        self,
        links: Sequence[Link],
        groups: Sequence[Sequence[LayerInfo]],
        opening: Opening,
        timeouts: Timeouts,
        joining: JoiningWorkers | None = None,
        joining_seconds: float = 2.0,
        remote: bool = True,
        model: str = "",
        excluded: ExclusionWatch = lambda *_: None,
        silence: SilenceWatch = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.opening = opening
        self.timeouts = timeouts
        self.closed = threading.Event()
        self._clock = clock
        self.workers = [self._connection(link) for link in links]
        self._groups = groups
        self._remote = remote
        self._model = model
        self._exclusions = Exclusions()
        self.wrong: list[Exclusion] = []
        self._told_of_exclusion = excluded
        self._told_of_silence = silence
        self._silent: dict[WorkerConnection, float] = {}  # since when
        self._refused: set[WorkerConnection] = set()  # that do not let this client in
        self._choosing = threading.Lock()
        self._introduce(self.workers)
        try:
            self._place()
        except UnknownLayerError as error:
            barred = [worker for worker in self.workers if worker.excluded]
            absent = [worker for worker in self.workers if worker.blocks is None and not worker.excluded]
            if barred:
                told = "; ".join(f"{worker.name}: {worker.last_problem}" for worker in barred)
                raise SecurityError(f"{told}. Nothing was sent to it; without it, {error}") from error
            if not absent:
                raise
            if self._refused.issuperset(absent):
                told = "; ".join(worker.last_problem for worker in absent)
                raise RefusedError(told if len(absent) == len(self.workers) else f"{told}; {error}") from error
            gone = "; ".join(f"{worker.name} ({worker.last_problem})" for worker in absent)
            rest = (
                f"; {error}" if len(absent) < len(self.workers) else ". Is the worker started, and the address right?"
            )
            raise TransportError(f"no answer within {timeouts.connect_timeout:g} s from {gone}{rest}") from error
        try:
            self._open_all()
        except BaseException:
            self._close_sessions()
            raise
        if joining is not None:
            threading.Thread(
                target=self._take_in, args=(joining, joining_seconds), name="ciphertune-joining", daemon=True
            ).start()

    def pieces(self, group: int) -> tuple[Piece, ...]:
        """Pieces of a group, each with the workers that hold it."""
        return self._pieces[group]

    def replicas(self, piece: Piece) -> list[WorkerConnection]:
        """The workers that hold all of a piece."""
        return [self.workers[index] for index in piece.workers]

    def reserve(
        self, piece: Piece, excluding: Collection[WorkerConnection], *, with_session: bool = False
    ) -> WorkerConnection | None:
        """Choose the worker to ask next for a piece and count it as busy until ``release``; None where there is none.

        Args:
            piece: what is to be evaluated.
            excluding: workers that are not to be asked.
            with_session: ask only workers at which a session is open.
        """
        now = self._clock()
        ready = [
            worker
            for worker in self.replicas(piece)
            if worker not in excluding
            and not worker.excluded
            and worker.not_before <= now
            and not (with_session and worker.session is None)
        ]
        with self._choosing:
            worker = min(ready, key=lambda w: (w.in_flight, w.failures, w.last_used), default=None)
            if worker is not None:
                worker.in_flight += 1
                worker.last_used = now
            return worker

    def release(self, worker: WorkerConnection) -> None:
        """Count a reserved worker as free again."""
        with self._choosing:
            worker.in_flight -= 1

    def exclude(self, worker: WorkerConnection, piece: Piece, direction: Direction, *, keep: bool = True) -> None:
        """Ask a worker for nothing more: it gave a wrong answer for a piece.

        One in this process has no replica to go to, and is no stranger: it is told of, and asked again.

        Args:
            worker: the worker.
            piece: what it answered wrongly.
            direction: of the product.
            keep: whether later sessions ask it for nothing either.
        """
        identity = worker.link.identity
        with self._choosing:
            known = worker.excluded
            for each in self.workers:
                if each is worker or (identity and each.link.identity == identity):
                    each.excluded = self._remote
        worker.last_problem = why = f"it gave a wrong answer for {' + '.join(piece.names)} ({direction})"
        if known:
            return
        found = Exclusion.now(worker.name, identity, self._model, why)
        self.wrong.append(found)
        keep = keep and self._remote
        if keep:
            self._exclusions.keep(found)
        log.error("%s: %s%s%s", worker.name, why, _ASKED_NO_MORE * self._remote, _KEPT * keep)
        self._told_of_exclusion(worker.name, piece.names, direction)

    def silent(self, worker: WorkerConnection, problem: str, seconds: float) -> None:
        """Tell once of a worker that does not answer; ``seconds`` are left until its product is given up."""
        with self._choosing:
            if worker in self._silent:
                return
            self._silent[worker] = self._clock()
        log.info("%s does not answer: %s", worker.name, problem)
        self._told_of_silence(worker.name, problem, max(0.0, seconds))

    def answered(self, worker: WorkerConnection) -> None:
        """Record a good answer, and tell of a worker that was silent before it."""
        worker.mark_answered()
        if worker in self._silent:
            with self._choosing:
                since = self._silent.pop(worker, None)
            if since is not None:
                log.info("%s answers again", worker.name)
                self._told_of_silence(worker.name, None, self._clock() - since)

    def others(self, piece: Piece, worker: WorkerConnection | None = None) -> bool:
        """Whether some worker but this one holds a piece and may be asked for it."""
        return any(not each.excluded for each in self.replicas(piece) if each is not worker)

    def retry_seconds(self, piece: Piece) -> float:
        """Seconds until a worker that holds a piece may be asked again; not above 0 where one may be asked now."""
        waiting = [worker.not_before for worker in self.replicas(piece) if not worker.excluded]
        return min(waiting, default=0.0) - self._clock()

    def close(self) -> None:
        """Close the session at every worker that still listens, and drop the links. Idempotent."""
        if self.closed.is_set():
            return
        self._close_sessions()
        with contextlib.ExitStack() as stack:
            for worker in self.workers:
                stack.callback(worker.link.close)

    def _connection(self, link: Link) -> WorkerConnection:
        return WorkerConnection(link, self._longest_backoff, self._clock)

    @property
    def _longest_backoff(self) -> float:
        # However short the deadline, a worker that comes back in time is noticed.
        return min(LONGEST_BACKOFF_SECONDS, self.timeouts.deadline / 8, self.timeouts.connect_timeout / 8)

    def _close_sessions(self) -> None:
        self.closed.set()
        closing = [future for worker in self.workers if (future := worker.close_session(worker.session))]
        wait(closing, timeout=min(_CLOSE_SECONDS, self.timeouts.timeout))

    def _place(self) -> None:
        """Cut the groups into pieces that workers hold. Pieces that are known stay known, for requests under way."""
        held = {index: worker.blocks for index, worker in enumerate(self.workers) if worker.blocks is not None}
        pieces = place(self._groups, held, {index: self.workers[index].name for index in held})
        for piece in (piece for parts in pieces for piece in parts):
            for worker in self.replicas(piece):
                worker.groups.setdefault(piece.names, len(worker.groups))
        self._pieces = pieces

    # Workers at the start.

    def _introduce(self, workers: Sequence[WorkerConnection]) -> None:
        """Ask workers what they hold, again after each ``timeout``; those that never answer stay without ``blocks``."""
        end = time.monotonic() + self.timeouts.connect_timeout
        failures = dict.fromkeys(workers, 0)
        # With the time at which it is asked again.
        asked: dict[Future[Message], tuple[WorkerConnection, str, float]] = {}
        again = dict.fromkeys((worker for worker in workers if not self._barred(worker)), 0.0)
        try:
            while (again or asked) and time.monotonic() < end and not self.closed.is_set():
                for worker in [worker for worker, since in again.items() if since <= time.monotonic()]:
                    del again[worker]
                    asked[worker.hello()] = worker, "hello", time.monotonic() + self.timeouts.timeout
                until = min(end, *again.values(), *(late for _, _, late in asked.values()))
                if not asked:
                    time.sleep(max(0.0, until - time.monotonic()))
                    continue
                done, _ = wait(asked, max(0.0, until - time.monotonic()), FIRST_COMPLETED)
                for future in done:
                    worker, kind, _ = asked.pop(future)
                    try:
                        reply = worker.reply(future, 0, kind)
                    except (Retry, TransportError) as error:
                        worker.last_problem = str(error)
                        if isinstance(error, RefusedError):
                            self._refused.add(worker)
                            continue
                        failures[worker] += 1
                        again[worker] = time.monotonic() + backoff(failures[worker], self._longest_backoff)
                        continue
                    if kind == "manifest":
                        worker.read_manifest(reply, lambda blocks: fitting(self._groups, blocks))
                    else:
                        worker.greeted(reply)
                    if (manifest := worker.ask_manifest()) is not None:
                        asked[manifest] = worker, "manifest", time.monotonic() + self.timeouts.timeout
                for future, (worker, _, late) in list(asked.items()):
                    if late <= time.monotonic() and not future.done():
                        worker.last_problem = f"no answer within {self.timeouts.timeout:g} s"
                        del asked[future]
                        future.cancel()
                        again[worker] = 0.0
        finally:
            for future in asked:
                future.cancel()
        for worker in workers:
            answers = any(each.blocks is not None for each in self.workers)
            if worker.blocks is None and not worker.excluded and answers:
                log.warning("no answer from %s, going on without it: %s", worker.name, worker.last_problem)

    def _barred(self, worker: WorkerConnection) -> bool:
        """Whether a worker was excluded in an earlier session; it is asked for nothing then."""
        if self._remote:
            found = self._exclusions.of(worker.name, worker.link.identity, self._model)
            if found is not None:
                worker.excluded, worker.last_problem = True, found.text
                log.error("%s: %s", worker.name, found.text)
        return worker.excluded

    def _open_all(self) -> None:
        """Open a session at every worker, and do without those whose replicas have one."""
        needed = [worker for worker in self.workers if worker.groups]
        # Preparing weights may take a worker long.
        with ThreadPoolExecutor(max(1, len(needed)), "ciphertune-open") as threads:
            problems = list(zip(needed, threads.map(self._open, needed), strict=True))
        for worker, problem in problems:
            if problem is None:
                continue
            for replicas, piece in ((self.replicas(piece), piece) for pieces in self._pieces for piece in pieces):
                if worker in replicas and all(other.session is None for other in replicas):
                    raise TransportError(
                        f"{worker.name}: no session could be opened for {' + '.join(piece.names)}: {problem}"
                    ) from problem
            log.warning("no session at %s, going on without it: %s", worker.name, problem)

    def _open(self, worker: WorkerConnection) -> Exception | None:
        """Open a session, with retries until the time is up; return the error where there is none."""
        end = time.monotonic() + self.timeouts.connect_timeout
        failures = 0
        while True:
            try:
                worker.open(self.opening, self.timeouts.timeout, 0, self.closed)
            except (Retry, TransportError) as error:
                worker.last_problem = str(error)
                if time.monotonic() > end or self.closed.is_set():
                    return error
                failures += 1
                self.closed.wait(backoff(failures, self._longest_backoff))
            else:
                return None

    # Workers that join later.

    def _take_in(self, joining: JoiningWorkers, seconds: float) -> None:
        while not self.closed.wait(seconds):
            try:
                found = joining([worker.link for worker in self.workers])
                if found:
                    self._join(found)
            except Exception as error:
                # The session goes on with the workers that it has.
                reason = error if isinstance(error, CipherTuneError) else type(error).__name__
                log.warning("joining workers could not be taken in: %s", reason)

    def _join(self, links: Sequence[Link]) -> None:
        """Take in workers that have joined: they share in the products from now on."""
        came = [self._connection(link) for link in links]
        with contextlib.ExitStack() as stack:
            for link in links:
                stack.callback(link.close)
            self._introduce(came)
            stack.pop_all()
        for worker in came:
            if worker.blocks is None:
                worker.link.close()  # unless it is excluded, it joins when the transport is next asked
                if worker.excluded:
                    self.workers.append(worker)
                continue
            self.workers.append(worker)
            self._place()
            if worker.groups and (problem := self._open(worker)) is not None:
                log.warning("no session at %s yet: %s", worker.name, problem)
            log.info("%s has joined", worker.name)
            if self.closed.is_set():
                worker.link.close()
