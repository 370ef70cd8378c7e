"""The workers of one session: which holds what, and a product that survives the failure of one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ThreadPoolExecutor,
    TimeoutError as FutureTimeoutError,
    wait,
)
from typing import Any

from ciphertune.errors import (
    CipherTuneError,
    ProtocolError,
    ReplyError,
    TransportError,
    TransportTimeoutError,
    UnknownLayerError,
    VersionError,
    WorkerError,
)
from ciphertune.placement import Holdings, Piece, place
from ciphertune.protocol import HELLO_VERSION, Message, agree, spoken_versions
from ciphertune.transport import Link
from ciphertune.weights import LayerInfo, read_manifest

log = logging.getLogger(__name__)

_BACKOFF = 0.05
_LONGEST_BACKOFF = 2.0
_FAREWELL_SECONDS = 2.0
_SLOWEST_LINK = 1 << 18
"""Bytes a second that a link is expected to carry at least: a large key gets the time that it then takes."""
_LARGE_KEY = 1 << 20

_NEWCOMERS_SECONDS = 2.0
"""How often a transport is asked for workers that have come."""

Newcomers = Callable[[Sequence[Link]], Sequence[Link]]
"""Given the open links, opens those to workers that have come since."""
KeyWatch = Callable[[str, int, bool], None]
"""Told the worker's name, a large key's bytes, and whether it has arrived or failed to, rather than sets out."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for workers, and what to do meanwhile.

    Attributes:
        timeout: seconds without an answer after which a request is sent again, to a replica where there is one.
        deadline: seconds that one product may take in all, restarts of workers included.
        hedge: seconds after which an unanswered request is also sent to a replica; 0 for never.
        connect_timeout: seconds to wait for the workers when a session opens.
    """

    timeout: float = 60.0
    deadline: float = 300.0
    hedge: float = 0.0
    connect_timeout: float = 20.0

    def extended(self, seconds: float) -> Patience:
        """The same for a product that may take so much longer."""
        return dataclasses.replace(
            self,
            timeout=self.timeout + seconds,
            deadline=self.deadline + seconds,
            hedge=self.hedge + seconds if self.hedge else 0.0,
        )


class _Retry(Exception):  # noqa: N818 - not an error: the reason to try again
    """This attempt failed in a way that another one, later or elsewhere, may not."""


class _UnknownSession(_Retry):
    """The worker was restarted, or closed a session that was idle."""


class _Worker:
    """One worker as this client knows it."""

    def __init__(self, link: Link, longest_backoff: float) -> None:
        self.link = link
        self._longest_backoff = longest_backoff
        self.version = HELLO_VERSION
        self.session: str | None = None
        self.units = 0
        self._forgetful = False
        self.holdings = ""
        self.in_flight = 0
        self.last_used = 0.0
        self.failures = 0
        self.not_before = 0.0
        self.last_problem = "no worker answers"
        self.opening = threading.Lock()
        self._lock = threading.Lock()

    def failed(self, problem: str) -> None:
        """Leave it alone for a while."""
        with self._lock:
            self.last_problem = problem
            now = time.monotonic()
            # Requests that fail together tell of one failure.
            if now >= self.not_before:
                self.failures += 1
                self.not_before = now + min(_BACKOFF * 2 ** min(self.failures - 1, 16), self._longest_backoff)

    def answered(self) -> None:
        """It is well."""
        with self._lock:
            self.failures = 0
            self._forgetful = False

    def forgot(self, session: str, problem: str) -> None:
        """It does not know this session."""
        with self._lock:
            if self.session != session:
                return  # Another thread has noticed already.
            self.session = None
            again, self._forgetful = self._forgetful, True
        # One that was restarted, or closed what was idle, is asked for another session at once. One that forgets
        # session after session is not, or this would never end.
        if again:
            self.failed(problem)


class Fleet:
    """Sessions with every worker that serves some of a model's layers.

    Args:
        links: a connection to every worker; they stay the caller's until the fleet is made.
        units: the layers of each unit of the client's session.
        open_request: what opens a session, without its groups.
        patience: see ``Patience``.
        watch: told of large keys on their way.
        newcomers: asked for workers that have come, on a thread of its own; None where none ever do.

    Raises:
        TransportError: workers that are needed cannot be reached.
        UnknownLayerError: together they do not hold every layer with the weights that this client expects.
        WorkerError, ReplyError: one refused, or answered nonsense.
    """

    def __init__(
        self,
        links: Sequence[Link],
        units: Sequence[Sequence[LayerInfo]],
        open_request: Message,
        patience: Patience,
        watch: KeyWatch | None = None,
        newcomers: Newcomers | None = None,
    ) -> None:
        # However short the deadline, a worker that comes back in time is noticed.
        self._longest_backoff = min(_LONGEST_BACKOFF, patience.deadline / 8)
        self._workers = [_Worker(link, self._longest_backoff) for link in links]
        self._units = units
        self._patience = patience
        self._open_request = open_request
        self._upload_seconds = open_request.nbytes / _SLOWEST_LINK
        self._watch = watch
        self._closed = threading.Event()
        self._choosing = threading.Lock()
        self._holdings = self._introduce(self._workers)
        # Per worker the groups its session opens, in the order of first use; a piece is known by its place there.
        self._groups: list[list[tuple[str, ...]]] = []
        self._place: list[dict[tuple[str, ...], int]] = []
        try:
            self._cut()
        except UnknownLayerError as error:
            absent = [w for i, w in enumerate(self._workers) if i not in self._holdings]
            if not absent:
                raise
            gone = "; ".join(f"{w.link.name} ({w.last_problem})" for w in absent)
            raise TransportError(f"no answer within {patience.connect_timeout:g} s from {gone}; {error}") from error
        try:
            self._open_all()
        except BaseException:
            self._part()
            raise
        if newcomers is not None:
            threading.Thread(
                target=self._watch_for, args=(newcomers,), name="ciphertune-newcomers", daemon=True
            ).start()

    def pieces(self, unit: int) -> tuple[Piece, ...]:
        """How a unit is cut."""
        return self._pieces[unit]

    def start(
        self, piece: Piece, fields: Mapping[str, Any], buffers: Mapping[str, Any], allowance: float = 0.0
    ) -> Call:
        """Send a request for a piece, which may take ``allowance`` seconds longer than others.

        ``Call.result`` waits for its reply.
        """
        return Call(self, piece, dict(fields), dict(buffers), allowance)

    def close(self) -> None:
        """Close the session at every worker that still listens, and drop the links. Idempotent."""
        if self._closed.is_set():
            return
        self._part()
        with contextlib.ExitStack() as stack:
            for worker in self._workers:
                stack.callback(worker.link.close)

    def _part(self) -> None:
        self._closed.set()
        farewells = [farewell for worker in self._workers if (farewell := _farewell(worker, worker.session))]
        wait(farewells, timeout=_FAREWELL_SECONDS)

    def _cut(self) -> None:
        """Cut the units into pieces that workers hold. What pieces are known stay known, for requests under way."""
        names = {index: self._workers[index].link.name for index in sorted(self._holdings)}
        pieces = place(self._units, self._holdings, names)
        for _ in range(len(self._groups), len(self._workers)):
            self._groups.append([])
            self._place.append({})
        for piece in (piece for parts in pieces for piece in parts):
            for index in piece.workers:
                if piece.names not in self._place[index]:
                    self._place[index][piece.names] = len(self._groups[index])
                    self._groups[index].append(piece.names)
        self._pieces = pieces

    def _watch_for(self, newcomers: Newcomers) -> None:
        while not self._closed.wait(_NEWCOMERS_SECONDS):
            try:
                found = newcomers([worker.link for worker in self._workers])
                if found:
                    self._join(found)
            except Exception as error:
                # The session goes on with the workers that it has.
                log.warning("newcomers could not be taken in: %s", error if _ours(error) else type(error).__name__)

    def _join(self, links: Sequence[Link]) -> None:
        """Take in workers that have come: they share in the products from now on."""
        came = [_Worker(link, self._longest_backoff) for link in links]
        with contextlib.ExitStack() as stack:
            for link in links:
                stack.callback(link.close)
            found = self._introduce(came)
            stack.pop_all()
        for position, worker in enumerate(came):
            if position not in found:
                worker.link.close()  # it is a newcomer again when next asked for
                continue
            index = len(self._workers)
            self._workers.append(worker)
            self._holdings[index] = found[position]
            self._cut()
            if self._groups[index] and (problem := self._open_at_start(index)) is not None:
                log.warning("no session at %s yet: %s", worker.link.name, problem)
            log.info("%s has joined", worker.link.name)
            if self._closed.is_set():
                worker.link.close()

    def _introduce(self, workers: Sequence[_Worker]) -> dict[int, Holdings]:
        """Ask workers what they hold, by their place among these; those that do not answer in time are left out."""
        end = time.monotonic() + self._patience.connect_timeout
        found: dict[int, Holdings] = {}
        asked: dict[Future[Message], tuple[int, str]] = {}
        again = dict.fromkeys(range(len(workers)), 0.0)
        try:
            while len(found) < len(workers) and time.monotonic() < end and not self._closed.is_set():
                for index in [i for i, since in again.items() if since <= time.monotonic()]:
                    del again[index]
                    hello = Message("hello", {"versions": spoken_versions()})
                    asked[_submit(workers[index], hello)] = index, "hello"
                until = min(end, *again.values()) if again else end
                if not asked:
                    time.sleep(max(0.0, until - time.monotonic()))
                    continue
                done, _ = wait(asked, max(0.0, until - time.monotonic()), FIRST_COMPLETED)
                for future in done:
                    index, kind = asked.pop(future)
                    worker = workers[index]
                    try:
                        reply = _ok(_value(future, 0), worker, kind)
                    except (_Retry, TransportError) as error:
                        worker.last_problem = str(error)
                        again[index] = time.monotonic() + _BACKOFF
                        continue
                    if kind == "manifest":
                        found[index] = _read_holdings(worker, reply)
                        continue
                    worker.holdings = _text(worker, reply, "holdings")
                    worker.version = _agreed(worker, reply)
                    asked[_submit(worker, Message("manifest"))] = index, "manifest"
        finally:
            for future in asked:
                future.cancel()
        for index, worker in enumerate(workers):
            if index not in found:
                log.warning("no answer from %s, going on without it: %s", worker.link.name, worker.last_problem)
        return found

    def _open_all(self) -> None:
        """Open a session at every worker, and do without those whose replicas have one."""
        needed = [index for index, groups in enumerate(self._groups) if groups]
        # Preparing weights may take a worker long.
        with ThreadPoolExecutor(max(1, len(needed)), "ciphertune-open") as pool:
            problems = dict(zip(needed, pool.map(self._open_at_start, needed), strict=True))
        for index, problem in problems.items():
            if problem is None:
                continue
            worker = self._workers[index]
            for piece in (piece for pieces in self._pieces for piece in pieces if index in piece.workers):
                if all(self._workers[i].session is None for i in piece.workers):
                    raise TransportError(
                        f"{worker.link.name}: no session could be opened for {' + '.join(piece.names)}: {problem}"
                    ) from problem
            log.warning("no session at %s, going on without it: %s", worker.link.name, problem)

    def _open_at_start(self, index: int) -> Exception | None:
        """Open a session, however often it takes until the time is up; why it could not be had."""
        worker = self._workers[index]
        end = time.monotonic() + self._patience.connect_timeout
        while True:
            try:
                self._open(worker, index, self._patience.timeout, 0)
            except (_Retry, TransportError) as error:
                worker.last_problem = str(error)
                if time.monotonic() > end or self._closed.is_set():
                    return error
                time.sleep(_BACKOFF)
            else:
                return None

    def _open(self, worker: _Worker, index: int, seconds: float, unit: int) -> str:
        """The worker's session, opened if none knows this unit; a large key may take longer than ``seconds``."""
        seconds += self._upload_seconds
        if (session := worker.session) is not None and unit < worker.units:
            return session
        begun = time.monotonic()
        if not worker.opening.acquire(timeout=seconds):
            raise _Retry(f"no session within {seconds:.3g} s")
        try:
            outdated = worker.session
            if outdated is not None and unit < worker.units:
                return outdated
            # Another thread found just now that none can be had: not one more wait for each of them.
            if worker.not_before > begun:
                raise _Retry(worker.last_problem)
            groups = [list(names) for names in self._groups[index]]
            request = Message(
                "open",
                {
                    **self._open_request.fields,
                    "groups": groups,
                    "holdings": worker.holdings,
                },
                self._open_request.buffers,
            )
            left = max(0.0, begun + seconds - time.monotonic())
            with self._key_on_its_way(worker.link.name):
                session = _text(worker, _ok(_value(_submit(worker, request), left), worker, "open"), "session")
            worker.units, worker.session = len(groups), session
            # What still runs in it is refused as unknown there, and sent again.
            _farewell(worker, outdated)
        finally:
            worker.opening.release()
        if self._closed.is_set():
            # Nobody else tells the worker of a session that was opened while this end closed.
            _farewell(worker, session)
            raise TransportError("the session was closed")
        return session

    @contextlib.contextmanager
    def _key_on_its_way(self, name: str) -> Iterator[None]:
        nbytes = self._open_request.nbytes
        if nbytes < _LARGE_KEY:
            yield
            return
        watch = self._watch or (lambda *_: None)
        log.info("sending a key of %.1f MB to %s", nbytes / 1e6, name)
        begun = time.monotonic()
        watch(name, nbytes, False)
        try:
            yield
            log.info("%s has the key of %.1f MB after %.1f s", name, nbytes / 1e6, time.monotonic() - begun)
        finally:
            watch(name, nbytes, True)


class Call:
    """One request for a piece, sent as often as it takes. Evaluation has no effects, so repeating it is safe."""

    def __init__(
        self, fleet: Fleet, piece: Piece, fields: dict[str, Any], buffers: dict[str, Any], allowance: float
    ) -> None:
        self._fleet = fleet
        self._patience = fleet._patience.extended(allowance)
        self._piece = piece
        self._fields = fields
        self._buffers = buffers
        self._begun = time.monotonic()
        # The worker may have to be given the key again.
        self._deadline = self._begun + self._patience.deadline + fleet._upload_seconds
        self._attempts: dict[Future[Message], tuple[int, str, float]] = {}
        self._hedge_not_before = 0.0
        self.attempts = 0
        self._launch(set())

    def result(self) -> Message:
        """The reply.

        Raises:
            TransportTimeoutError: the deadline passed.
            WorkerError, ReplyError: a worker refused the request for good, or answered nonsense.
        """
        while True:
            if self._fleet._closed.is_set():
                raise TransportError(f"the session was closed before {self._what} was answered")
            if self._attempts:
                reply = self._wait()
                if reply is not None:
                    self.forget()
                    return reply
            # Only now, for a reply may have come long before anybody asked for it.
            if time.monotonic() >= self._deadline:
                raise TransportTimeoutError(self._failure(time.monotonic() - self._begun))
            if not self._attempts and not self._launch(set()):
                self._pause()

    def forget(self) -> None:
        """Give up whatever is still under way. Idempotent."""
        for future in list(self._attempts):
            self._forget(future)

    def _launch(self, busy: set[int], hedging: bool = False) -> bool:
        """Send the request to the least loaded worker that is not known to be unwell; False where there is none."""
        tried = set(busy)
        while (index := self._reserve(tried, hedging)) is not None:
            tried.add(index)
            worker = self._fleet._workers[index]
            begun = time.monotonic()
            try:
                seconds = max(0.0, min(self._patience.timeout, self._deadline - begun))
                unit = self._fleet._place[index][self._piece.names]
                session = self._fleet._open(worker, index, seconds, unit)
                request = Message("evaluate", {**self._fields, "session": session, "unit": unit}, self._buffers)
                self._attempts[_submit(worker, request)] = (index, session, time.monotonic())
            except BaseException as error:
                self._release(index)
                # Sessions whose opening was answered too late count at the worker until they run out.
                full = isinstance(error, WorkerError) and error.code == "quota"
                if not (full or isinstance(error, (_Retry, TransportError))):
                    raise
                worker.failed(str(error))
            else:
                self.attempts += 1
                return True
        return False

    def _reserve(self, tried: set[int], hedging: bool) -> int | None:
        """The worker to ask next, counted as busy from now on."""
        workers = self._fleet._workers
        now = time.monotonic()
        # A hedge must not wait for a session while the answer that it hedges may come.
        ready = [
            i
            for i in self._piece.workers
            if i not in tried and workers[i].not_before <= now and not (hedging and workers[i].session is None)
        ]
        with self._fleet._choosing:
            index = min(
                ready, key=lambda i: (workers[i].in_flight, workers[i].failures, workers[i].last_used), default=None
            )
            if index is not None:
                workers[index].in_flight += 1
                workers[index].last_used = now
            return index

    def _release(self, index: int) -> None:
        with self._fleet._choosing:
            self._fleet._workers[index].in_flight -= 1

    def _wait(self) -> Message | None:
        """Wait until something happens; the reply, if that is what happened."""
        patience = self._patience
        oldest = min(started for _, _, started in self._attempts.values())
        newest = max(started for _, _, started in self._attempts.values())
        may_hedge = patience.hedge > 0 and len(self._attempts) < len(self._piece.workers)
        until = min(self._deadline, oldest + patience.timeout)
        if may_hedge:
            until = min(until, max(newest + patience.hedge, self._hedge_not_before))
        done, _ = wait(self._attempts, max(0.0, until - time.monotonic()), FIRST_COMPLETED)
        for future in done:
            index, session, _ = self._attempts[future]
            worker = self._fleet._workers[index]
            self._forget(future)
            try:
                reply = _ok(_value(future, 0), worker, "evaluate")
            except TransportError as error:
                worker.failed(str(error))
            except _UnknownSession as error:
                worker.forgot(session, str(error))
            except _Retry as error:
                worker.failed(str(error))
            except WorkerError as error:
                # What one worker stumbles over, its replica may not.
                if error.code != "internal" or self.attempts >= len(self._piece.workers):
                    raise
                worker.failed(str(error))
            else:
                worker.answered()
                return reply
        now = time.monotonic()
        for future, (index, _, started) in list(self._attempts.items()):
            if now >= started + patience.timeout and not future.done():
                self._forget(future)
                self._fleet._workers[index].failed(f"no answer within {patience.timeout:g} s")
        if may_hedge and self._attempts and not done and now >= max(newest + patience.hedge, self._hedge_not_before):
            busy = {index for index, _, _ in self._attempts.values()}
            if not self._launch(busy, hedging=True):
                self._hedge_not_before = now + _BACKOFF
        return None

    def _pause(self) -> None:
        """Wait until a worker may be asked again."""
        next_time = min(self._fleet._workers[i].not_before for i in self._piece.workers)
        self._fleet._closed.wait(max(0.001, min(next_time, self._deadline) - time.monotonic()))

    def _forget(self, future: Future[Message]) -> None:
        index, _, _ = self._attempts.pop(future)
        self._release(index)
        future.cancel()

    @property
    def _what(self) -> str:
        return f"{' + '.join(self._piece.names)} ({self._fields['direction']})"

    def _failure(self, seconds: float) -> str:
        told = "; ".join(
            f"{self._fleet._workers[i].link.name}: {self._fleet._workers[i].last_problem}" for i in self._piece.workers
        )
        return (
            f"{self._what} had no answer within {seconds:.3g} s and {self.attempts} attempts. {told}. Start the worker "
            "again and resume from the last checkpoint, or raise the option deadline"
        )


def _submit(worker: _Worker, request: Message) -> Future[Message]:
    """A future of the reply, failed where the link fails to take the request."""
    request.version = HELLO_VERSION if request.kind == "hello" else worker.version
    try:
        return worker.link.submit(request)
    except Exception as error:
        future: Future[Message] = Future()
        future.set_exception(error)
        return future


def _ours(error: Exception) -> bool:
    return isinstance(error, CipherTuneError)


def _farewell(worker: _Worker, session: str | None) -> Future[Message] | None:
    return None if session is None else _submit(worker, Message("close", {"session": session}))


def _value(future: Future[Message], seconds: float) -> Message:
    try:
        return future.result(seconds)
    except TransportError:
        raise  # which may be a timeout of the link's own
    except FutureTimeoutError:
        future.cancel()
        raise TransportTimeoutError(f"no answer within {seconds:.3g} s") from None
    except CancelledError:
        raise TransportError("the request was given up") from None
    except CipherTuneError:
        raise
    except Exception as error:
        # Its text may quote what was sent.
        log.warning("the transport failed", exc_info=error)
        raise TransportError(f"the transport failed: {type(error).__name__}") from error


def _agreed(worker: _Worker, reply: Message) -> int:
    try:
        return agree(reply.fields.get("versions"))
    except VersionError as error:
        raise VersionError(f"{worker.link.name}: {error}") from error
    except ProtocolError as error:
        raise ReplyError(f"{worker.link.name}: {error}") from error


def _read_holdings(worker: _Worker, reply: Message) -> Holdings:
    try:
        return read_manifest(reply.fields.get("blocks"))
    except ProtocolError as error:
        raise ReplyError(f"{worker.link.name}: {error}") from error


def _text(worker: _Worker, reply: Message, field: str) -> str:
    value = reply.fields.get(field)
    if not isinstance(value, str):
        raise ReplyError(f"{worker.link.name} sent a reply without the field {field!r}")
    return value


def _ok(reply: Message, worker: _Worker, kind: str) -> Message:
    """The reply if it is a good one."""
    if reply.kind == "error":
        code, text = str(reply.fields.get("code")), str(reply.fields.get("message"))[:2000]
        if code == "unknown-session":
            raise _UnknownSession("it does not know the session that it opened")
        if code in ("busy", "holdings"):
            raise _Retry(text)
        raise WorkerError(f"{worker.link.name} refused a request of kind {kind!r}: {text}", code)
    if reply.kind != "ok":
        raise ReplyError(f"{worker.link.name} answered a {kind!r} request with {reply.kind!r}")
    return reply
