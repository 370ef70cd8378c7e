"""This process's end of its relays. Nothing of Ray is imported here."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ciphertune.errors import ConfigError, ProtocolError
from ciphertune.protocol import Frame
from ciphertune.transport import PendingReplies
from ciphertune_ray.pipe import Pipe, pair

log = logging.getLogger(__name__)

_LINGER_SECONDS = 10.0
"""How long a relay that nobody uses is kept for whoever comes next: it takes seconds to join a cluster."""
_JOIN_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_END_SECONDS = 8.0
_INHERITED = {"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT"}
_FAMILIES = ("RAY_", "PYTHON", "LC_", "OMP_", "GRPC_", "SSL_CERT_")

Answer = tuple[dict[str, Any], list[Frame]]
Push = Callable[[dict[str, Any], list[Frame]], None]
"""Takes what a relay says unasked of a hosted actor: a request, or ``{"op": "lost", "why": …}`` when nothing comes any
more. Called on the thread that reads from the relay, so it must not wait."""


class Bridge:
    """A relay, started when first asked for something, and again if it has ended.

    Args:
        cluster: as ``Address.ray``.
        most: bytes of requests that it lets be under way.
        linger: seconds for which it is kept after its last holder released it.

    Attributes:
        hosted: who is told what is said of an actor.
    """

    def __init__(self, cluster: str | None, most: int, linger: float = 0.0) -> None:
        self._cluster, self._most, self._linger = cluster, most, linger
        self.hosted: dict[str, Push] = {}
        self._holders = 0
        self._pending: PendingReplies[Answer] = PendingReplies(f"ray://{(cluster or 'local').removeprefix('ray://')}")
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._not_before = 0.0
        self._problem = "the relay has ended"
        self.closed = False

    def hold(self) -> Bridge:
        """Take a share in it."""
        with self._lock:
            self._holders += 1
        return self

    def release(self) -> None:
        """Give a share back; it is closed, now or a little later, when it was the last."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        if not self._linger:
            self.close()
            return
        timer = threading.Timer(self._linger, self._expire)
        timer.daemon = True
        timer.start()

    def ask(self, head: dict[str, Any], frames: Sequence[Frame] = ()) -> Future[Answer]:
        """Send something that is answered. The future fails with ``TransportError`` if it cannot be.

        What is asked of a bundle may also fail with ``ConfigError``.
        """
        number, answer = self._pending.add()
        if not answer.done() and (why := self._send({**head, "id": number}, frames)) is not None:
            self._pending.fail(number, why)
        return answer

    def tell(self, head: dict[str, Any], frames: Sequence[Frame], sent: Callable[[], None]) -> None:
        """Send something that is not answered; ``sent`` is called once its frames have left or never will."""
        if self._send(head, frames, sent) is not None:
            sent()

    def close(self) -> None:
        """End the relay; what is pending fails. Idempotent."""
        with self._lock:
            self.closed = True
            running, self._running = self._running, None
        self._pending.close()
        if running is not None:
            running.end()

    def _send(
        self, head: dict[str, Any], frames: Sequence[Frame], sent: Callable[[], None] | None = None
    ) -> str | None:
        """Why it cannot be sent, if so."""
        with self._lock:
            if self.closed:
                return "the link is closed"
            if self._running is None:
                if time.monotonic() < self._not_before:
                    return self._problem
                self._not_before = time.monotonic() + _RETRY_SECONDS
                self._running = _Running(self._cluster, self._most, self._received, self._ended)
            self._running.outgoing.put((head, frames, sent))
        return None

    def _received(self, head: dict[str, Any], frames: list[Frame]) -> None:
        number = head.get("id")
        if isinstance(number, int):
            if "error" in head:
                error = str(head["error"])[:2000]
                self._pending.fail(number, ConfigError(error) if head.get("kind") == "ConfigError" else error)
            else:
                self._pending.answer(number, (head, frames))
        elif (push := self.hosted.get(str(head.get("actor")))) is not None:
            push(head, frames)

    def _ended(self, running: _Running, why: str) -> None:
        with self._lock:
            mine = self._running is running
            if mine:
                self._running, self._problem = None, why
        if mine:
            self._pending.fail_all(why)
            for push in list(self.hosted.values()):
                push({"op": "lost", "why": why}, [])

    def _expire(self) -> None:
        with _sharing:  # so that nobody takes a share meanwhile
            idle = not self._holders
            self.closed = self.closed or idle
        if idle:
            self.close()


class _Running:
    """One life of a relay: its process, and the threads that write to it and read from it."""

    def __init__(self, cluster: str | None, most: int, received: Push, ended: Callable[[_Running, str], None]) -> None:
        here, there = pair()
        self._pipe = Pipe(here)
        self._received, self._ended = received, ended
        self.outgoing: queue.SimpleQueue[tuple[dict[str, Any], Sequence[Frame], Callable[[], None] | None] | None]
        self.outgoing = queue.SimpleQueue()
        # A session of its own, so that Ctrl-C is this process's to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ciphertune_ray.relay", str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
        there.close()
        self._ending = False
        self._impatience = threading.Timer(_JOIN_SECONDS, self._process.kill)
        self._impatience.daemon = True
        self._impatience.start()
        self.outgoing.put(({"cluster": cluster, "most": most}, (), None))
        for target, name in ((self._write, "write"), (self._read, "read")):
            threading.Thread(target=target, name=f"ciphertune-ray-{name}", daemon=True).start()

    def end(self) -> None:
        """Hang up, which ends the process, and wait for that."""
        self._ending = True
        self._pipe.close()
        self.outgoing.put(None)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self) -> None:
        while (item := self.outgoing.get()) is not None:
            head, frames, sent = item
            # A relay that is gone is noticed by whoever reads from it.
            with contextlib.suppress(OSError):
                self._pipe.send(head, frames)
            if sent is not None:
                sent()
            del item, frames, sent  # not kept until the next one comes

    def _read(self) -> None:
        why = f"the cluster cannot be joined: it did not answer within {_JOIN_SECONDS:g} s"
        try:
            while (message := self._pipe.receive()) is not None:
                head, frames = message
                if head.get("op") == "failed":
                    why = f"the cluster cannot be joined: {str(head.get('error'))[:1000]}"
                elif head.get("op") == "joined":
                    self._impatience.cancel()
                    why = "the relay to the cluster has ended"
                else:
                    self._received(head, frames)
                del message, head, frames
        except ProtocolError as error:
            why = str(error)
        except Exception as error:
            log.exception("reading from the relay failed")
            why = f"reading from the relay failed: {type(error).__name__}"
        self._impatience.cancel()
        if not self._ending:
            self._pipe.close()
            self.outgoing.put(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        self._ended(self, why)


_shared: dict[tuple[int, str | None, int], Bridge] = {}
_sharing = threading.Lock()


def shared_bridge(cluster: str | None, most: int) -> Bridge:
    """The bridge that all of this process use for a cluster; ``release`` it in the end."""
    key = (os.getpid(), cluster, most)  # a child process that was forked has none of its parent's threads
    with _sharing:
        if key not in _shared or _shared[key].closed:
            _shared[key] = Bridge(cluster, most, linger=_LINGER_SECONDS)
        return _shared[key].hold()


@atexit.register
def _end_all() -> None:
    for (process, _, _), bridge in _shared.items():
        if process == os.getpid():
            bridge.close()


def _environment() -> dict[str, str]:
    """What a relay needs of this process's environment, which may hold tokens and passwords that it does not."""
    return {name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith(_FAMILIES)}
