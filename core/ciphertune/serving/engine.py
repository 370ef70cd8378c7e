"""The thread that computes all answers of a server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from ciphertune._support.denormals import flush_here
from ciphertune.errors import CipherTuneError, ProtocolError, TransportError, WorkerError
from ciphertune.serving.answers import Answer
from ciphertune.serving.decoding import Decoder
from ciphertune.serving.request_error import RequestError, failed, unavailable
from ciphertune.serving.waiting import WaitingAnswers

log = logging.getLogger("ciphertune.serve")

_GATHER_SECONDS = 0.02
"""How long an idle server waits after a request for others that come with it."""

_CLOSE_SECONDS = 5.0


class Engine:
    """Computes answers on a thread of its own, as many together as there are, up to a limit.

    Args:
        decoder: computes them; used on that thread alone.
        most: answers at a time.
        waiting: answers of one caller that may wait.
    """

    def __init__(self, decoder: Decoder, most: int, waiting: int) -> None:
        self._decoder = decoder
        self._most = most
        self._waiting = WaitingAnswers(waiting)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ciphertune-serve", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Let the answers of one request be computed. Raises ``RequestError``."""
        with self._changed:
            if self._closed:
                raise unavailable()
            self._waiting.add(answers)
            self._changed.notify()

    def close(self) -> None:
        """End, after the step that is under way; answers that are not complete fail. Idempotent.

        A step that waits for a lost worker is not waited for: it ends with the session.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        flush_here()
        while True:
            joining = self._next()
            if joining is None:
                break
            if joining:
                error = _error_of(lambda joining=joining: self._decoder.join(joining))  # type: ignore[misc]
                if error is not None:
                    self._fail(joining, error)
                    continue
            error = _error_of(self._decoder.step)
            if error is not None:
                self._fail(self._decoder.answers, error)
                self._decoder.clear()
        for answer in [*self._decoder.answers, *self._waiting.take(1 << 30)]:
            answer.fail(unavailable())
        self._decoder.clear()

    def _next(self) -> list[Answer] | None:
        """Answers that join now; None at the end. Waits while there is nothing to do."""
        with self._changed:
            if not self._decoder.answers:
                while not self._closed and not len(self._waiting):
                    self._changed.wait()
                self._gather()
            if self._closed:
                return None
            room = self._most - len(self._decoder.answers)
            if not self._decoder.open or room <= 0:
                return []
            if self._decoder.mixes:
                return self._waiting.take(room)
            under_way = next((answer.caller for answer in self._decoder.answers), None)
            turn = self._waiting.whose_turn()
            # The batch is left to end where another caller's turn has come.
            return self._waiting.take(room, turn) if turn is not None and under_way in (None, turn) else []

    def _gather(self) -> None:
        end = time.monotonic() + _GATHER_SECONDS
        while not self._closed and len(self._waiting) < self._most and (left := end - time.monotonic()) > 0:
            self._changed.wait(left)

    @staticmethod
    def _fail(answers: Sequence[Answer], error: Exception) -> None:
        # Errors of ours hold nothing of what was computed; those of other packages may.
        told = str(error) if isinstance(error, CipherTuneError) else "(its text is left out)"
        log.error("%d answers failed: %s: %s", len(answers), type(error).__name__, told)
        workers = isinstance(error, (TransportError, WorkerError, ProtocolError))
        refusal: RequestError = unavailable() if workers else failed()
        for answer in answers:
            answer.fail(refusal)


def _error_of(action: Callable[[], None]) -> Exception | None:
    """What an action raises. A log written while it is handled could end up with its text."""
    try:
        action()
    except Exception as error:
        return error
    return None
