"""One request for a piece of a product, sent as often as it takes: retries, hedges, a deadline."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, TimeoutError as FutureTimeoutError, wait
from typing import Any

from ciphertune.backend import Buffers, Direction
from ciphertune.client.connection import BACKOFF_SECONDS, Opening, Retry, UnknownSession, WorkerConnection
from ciphertune.client.placement import Piece
from ciphertune.client.pool import WorkerPool
from ciphertune.errors import ReplyError, TransportError, TransportTimeoutError, WorkerError, WrongReplyError
from ciphertune.protocol import Message


class KeysReplaced(Exception):  # noqa: N818 - not an error: the reason to encrypt the product again
    """The session has other keys than those that a request was encrypted under."""


def _first(futures: list[Future[Message]], seconds: float) -> Collection[Future[Message]]:
    """Those that are done, as soon as one is, or none after so many seconds."""
    if len(futures) > 1:
        return wait(futures, seconds, FIRST_COMPLETED).done
    # Which costs a fraction of waiting for any of several.
    with contextlib.suppress(FutureTimeoutError, CancelledError):
        futures[0].exception(seconds)
    return [each for each in futures if each.done()]


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One sending of the request, still unanswered."""

    worker: WorkerConnection
    session: str
    started: float


class PendingRequest:
    """A request for a piece that was sent. Evaluation has no effects, so repeating it is safe.

    Args:
        pool: the workers.
        piece: what is to be evaluated.
        direction: of the product.
        opening: of sessions with the keys that it was encrypted under; no others get it.
        buffers: of the request.
        check: raises ``ReplyError`` for a reply that is not the product.
        allowance: seconds that it may take longer than others.
        reply_bytes: of the reply's buffers at most; None where that is not known.

    Attributes:
        attempts: how often it was sent.
        begun: when it was first, as ``time.monotonic``.
        check_seconds: time that replies were checked.
        answered_by: who gave the reply.
    """

    def __init__(
        self,
        pool: WorkerPool,
        piece: Piece,
        direction: Direction,
        opening: Opening,
        buffers: Mapping[str, Any],
        check: Callable[[Buffers], None],
        allowance: float = 0.0,
        reply_bytes: int | None = None,
    ) -> None:
        self.attempts = 0
        self.check_seconds = 0.0
        self._check = check
        self._pool = pool
        self._piece = piece
        self._direction = direction
        self._opening = opening
        self.answered_by: WorkerConnection | None = None
        self._buffers = dict(buffers)
        self._reply_bytes = reply_bytes
        self._timeouts = pool.timeouts.extended(allowance)
        self.begun = time.monotonic()
        # The worker may have to be given the key again.
        self._deadline = self.begun + self._timeouts.deadline + opening.upload_seconds
        self._under_way: dict[Future[Message], _Attempt] = {}
        self._hedge_not_before = 0.0
        self._send()

    def result(self) -> Message:
        """Wait for the reply.

        Raises:
            TransportTimeoutError: the deadline passed.
            TransportError: the session was closed.
            WorkerError, ReplyError: a worker refused the request for good, or answered nonsense.
            WrongReplyError: every worker that holds the piece gave a wrong answer.
            KeysReplaced: it would have to be sent again, and the session has other keys by now.
        """
        while True:
            if self._pool.closed.is_set():
                raise TransportError(f"the session was closed before {self._what} was answered")
            if self._under_way:
                reply = self._wait()
                if reply is not None:
                    self.abandon()
                    return reply
            # Only now, for a reply may have come long before anybody asked for it.
            if time.monotonic() >= self._deadline:
                raise TransportTimeoutError(self._failure(time.monotonic() - self.begun))
            if not self._under_way and not self._send():
                if not self._pool.others(self._piece):
                    problems = "; ".join(
                        f"{each.name}: {each.last_problem}" for each in self._pool.replicas(self._piece)
                    )
                    raise WrongReplyError(f"{self._what}: no worker is left that answers rightly. {problems}")
                self._pause()

    def abandon(self) -> None:
        """Give up whatever is still under way. Idempotent."""
        for future in list(self._under_way):
            self._drop(future)

    def _send(self, *, hedging: bool = False) -> bool:
        """Send the request to the least loaded worker that is not backing off; False where there is none."""
        if self._pool.opening is not self._opening:
            raise KeysReplaced
        tried = {attempt.worker for attempt in self._under_way.values()}
        # A hedge must not wait for a session while the answer that it hedges may come.
        while (worker := self._pool.reserve(self._piece, tried, with_session=hedging)) is not None:
            tried.add(worker)
            try:
                seconds = max(0.0, min(self._timeouts.timeout, self._deadline - time.monotonic()))
                group = worker.groups[self._piece.names]
                session = worker.open(self._opening, seconds, group, self._pool.closed)
                fields = {"session": session, "group": group, "direction": self._direction}
                future = worker.submit(Message("evaluate", fields, self._buffers), self._reply_bytes)
                self._under_way[future] = _Attempt(worker, session, time.monotonic())
            except BaseException as error:
                self._pool.release(worker)
                # Sessions whose opening was answered too late count at the worker until they run out.
                full = isinstance(error, WorkerError) and error.code == "quota"
                if not (full or isinstance(error, (Retry, TransportError))):
                    raise
                self._failed(worker, error)
            else:
                self.attempts += 1
                return True
        return False

    def _wait(self) -> Message | None:
        """Wait for a reply, a timeout or the time to hedge; return the reply, if that is what came."""
        timeouts = self._timeouts
        starts = [attempt.started for attempt in self._under_way.values()]
        may_hedge = timeouts.hedge > 0 and len(starts) < len(self._piece.workers)
        hedge_at = max(max(starts) + timeouts.hedge, self._hedge_not_before)
        until = min(self._deadline, min(starts) + timeouts.timeout)
        if may_hedge:
            until = min(until, hedge_at)
        done = _first(list(self._under_way), max(0.0, until - time.monotonic()))
        for future in done:
            reply = self._read(future)
            if reply is not None:
                return reply
        now = time.monotonic()
        for future, attempt in list(self._under_way.items()):
            if now >= attempt.started + timeouts.timeout and not future.done():
                self._drop(future)
                self._failed(attempt.worker, TransportTimeoutError(f"no answer within {timeouts.timeout:g} s"))
        if may_hedge and self._under_way and not done and now >= hedge_at and not self._send(hedging=True):
            self._hedge_not_before = now + BACKOFF_SECONDS
        return None

    def _read(self, future: Future[Message]) -> Message | None:
        """The reply of an attempt that ended, None where another attempt may do better."""
        attempt = self._drop(future)
        worker = attempt.worker
        try:
            reply = worker.reply(future, 0, "evaluate")
        except UnknownSession as error:
            worker.mark_forgotten(attempt.session, str(error))
        except (Retry, TransportError) as error:
            self._failed(worker, error)
        except WorkerError as error:
            # What one worker stumbles over, its replica may not.
            if error.code != "internal" or self.attempts >= len(self._piece.workers):
                raise
            worker.mark_failed(str(error))
        else:
            if self._accept(worker, reply):
                self._pool.answered(worker)
                self.answered_by = worker
                return reply
        return None

    def _failed(self, worker: WorkerConnection, error: BaseException) -> None:
        """Have a worker back off; one that is busy is not silent."""
        worker.mark_failed(str(error))
        if isinstance(error, TransportError) and not self._pool.closed.is_set():
            self._pool.silent(worker, str(error), self._deadline - time.monotonic())

    def _accept(self, worker: WorkerConnection, reply: Message) -> bool:
        """Whether a reply is the product that was asked for; whoever gave another one is asked no more."""
        begun = time.perf_counter()
        try:
            self._check(reply.buffers)
        except ReplyError as error:
            # One of the wrong form may be of another version of the worker; a wrong product is none of these.
            keep = isinstance(error, WrongReplyError)
            self._pool.exclude(worker, self._piece, self._direction, keep=keep)
            if not self._pool.others(self._piece, worker):
                raise type(error)(
                    f"{worker.name}: {error}. It is broken or lies, and no other worker holds these rows. Nothing of "
                    "the answer was used: resume from the last checkpoint with a worker that computes rightly"
                ) from None
            return False
        finally:
            self.check_seconds += time.perf_counter() - begun
        return True

    def _pause(self) -> None:
        """Wait until a worker may be asked again."""
        seconds = min(self._pool.retry_seconds(self._piece), self._deadline - time.monotonic())
        self._pool.closed.wait(max(0.001, seconds))

    def _drop(self, future: Future[Message]) -> _Attempt:
        attempt = self._under_way.pop(future)
        self._pool.release(attempt.worker)
        future.cancel()
        return attempt

    @property
    def _what(self) -> str:
        return f"{' + '.join(self._piece.names)} ({self._direction})"

    def _failure(self, seconds: float) -> str:
        told = "; ".join(f"{worker.name}: {worker.last_problem}" for worker in self._pool.replicas(self._piece))
        return (
            f"{self._what} had no answer within {seconds:.3g} s and {self.attempts} attempts. {told}. Start the worker "
            "again and resume from the last checkpoint, or raise the option deadline"
        )
