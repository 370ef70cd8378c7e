"""A link that delays and loses what another one carries."""

from __future__ import annotations

import functools
import random
import threading
import time
from concurrent.futures import Future

from ciphertune.protocol import Message
from ciphertune.transport import Link, PendingReplies
from ciphertune_flaky import FlakyOptions
from ciphertune_flaky.later import Later

_LOST = "the connection was lost (the flaky transport says so)"


class FlakyLink(Link):
    """Hands requests on, unless they are lost, and replies back, later.

    Args:
        link: to the worker.
        options: how bad it is.
    """

    def __init__(self, link: Link, options: FlakyOptions) -> None:
        self.name, self.identity = link.name, link.identity
        self._link = link
        self._options = options
        self._pending: PendingReplies[Message] = PendingReplies(link.name)
        self._later = Later()
        self._lock = threading.Lock()
        seed = options.flaky_seed
        self._luck = random.Random() if seed is None else random.Random(f"{seed} {link.name}")
        self._down_until = 0.0

    def submit(self, request: Message) -> Future[Message]:
        """See ``Link.submit``. The future of a lost request stays open, as over a network that loses it."""
        number, reply = self._pending.add()
        if reply.done():
            return reply
        o = self._options
        with self._lock:
            # As many numbers for each request, whatever becomes of it: luck depends on the order of requests alone.
            dropped, lost, unsent = (self._luck.random() < chance for chance in (o.drops, o.loss, 0.5))
            delay = o.latency + o.jitter * self._luck.random()
            now = time.monotonic()
            if dropped:
                self._down_until = now + o.down
            down = dropped or now < self._down_until
        if dropped:
            self._pending.fail_all(_LOST)
        if down:
            self._pending.fail(number, _LOST)
        if down or (lost and unsent):
            return reply
        inner = self._link.submit(request)
        reply.add_done_callback(lambda _: inner.cancel())
        inner.add_done_callback(functools.partial(self._answered, number, lost, delay))
        return reply

    def close(self) -> None:
        """See ``Link.close``."""
        self._pending.close()
        self._link.close()
        self._later.close()

    def _answered(self, number: int, lost: bool, delay: float, inner: Future[Message]) -> None:
        if inner.cancelled():
            return
        error = inner.exception()
        if error is not None:
            # That no reply will come is known here, and does not travel.
            self._pending.fail(number, error)
        elif not lost:
            self._later.do(delay, functools.partial(self._pending.answer, number, inner.result()))
