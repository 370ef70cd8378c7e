"""The client of a relay process, which it starts and supervises. Ray is not imported here."""

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from ciphertune._support.printable import LONGEST_TEXT, printable
from ciphertune.errors import ConfigError, ProtocolError, ReplyError
from ciphertune.key_files import hide_process
from ciphertune.protocol import Frame
from ciphertune.transport import PendingReplies
from ciphertune_ray.channel import Channel, socket_pair

log = logging.getLogger(__name__)

_LINGER_SECONDS = 10.0
"""How long an unused relay process is kept for the next user: joining a cluster takes seconds."""
_JOIN_SECONDS = 120.0
_RETRY_SECONDS = 1.0
_EXIT_SECONDS = 8.0
_INHERITED = {"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT"}
_PREFIXES = ("RAY_", "PYTHON", "LC_", "OMP_", "GRPC_", "SSL_CERT_")

Answer = tuple[dict[str, Any], list[Frame]]
Notify = Callable[[dict[str, Any], list[Frame]], None]
"""Takes a message of the relay about an actor that this process serves: a request, or ``{"op": "lost", "why": …}`` once
no more requests will come. Called on the thread that reads from the relay, so it must not block."""


class RelayClient:
    """Requests to a relay process, which is started with the first one and again after it has ended.

    Args:
        cluster: as ``Address.ray``.
        max_inflight: bytes of requests that the relay lets be under way.
        linger: seconds for which the process is kept after its last user released it.

    Attributes:
        served: by the name of an actor that this process serves, what takes the messages about it.
    """

    def __init__(self, cluster: str | None, max_inflight: int, linger: float = 0.0) -> None:
        self._cluster, self._max_inflight, self._linger = cluster, max_inflight, linger
        self.served: dict[str, Notify] = {}
        self._users = 0
        self._pending: PendingReplies[Answer] = PendingReplies(f"ray://{(cluster or 'local').removeprefix('ray://')}")
        self._most: dict[int, int] = {}
        self._lock = threading.Lock()
        self._process: _RelayProcess | None = None
        self._not_before = 0.0
        self._problem = "the relay has ended"
        self.closed = False

    def acquire(self) -> RelayClient:
        """Count one more user."""
        with self._lock:
            self._users += 1
        return self

    def release(self) -> None:
        """Count one user less; after the last one it is closed, at once or ``linger`` seconds later."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        if not self._linger:
            self.close()
            return
        timer = threading.Timer(self._linger, self._close_if_unused)
        timer.daemon = True
        timer.start()

    def request(self, head: dict[str, Any], frames: Sequence[Frame] = (), most_bytes: int = 0) -> Future[Answer]:
        """Send a request to the relay.

        Args:
            head: what is asked.
            frames: that go with it.
            most_bytes: of the answer's frames; a longer answer is passed over as it comes.

        The future fails with ``TransportError`` if it cannot be answered, and with ``ConfigError`` if a bundle that it
        names is wrong.
        """
        number, answer = self._pending.add()
        if not answer.done():
            self._most[number] = most_bytes
            answer.add_done_callback(lambda _: self._most.pop(number, None))
        if not answer.done() and (why := self._send({**head, "id": number}, frames)) is not None:
            self._pending.fail(number, why)
        return answer

    def send(self, head: dict[str, Any], frames: Sequence[Frame], sent: Callable[[], None]) -> None:
        """Send a message without an answer; ``sent`` is called once its frames have left, or never will."""
        if self._send(head, frames, sent) is not None:
            sent()

    @property
    def pid(self) -> int | None:
        """The number of the process, None while there is none."""
        with self._lock:
            return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process; pending requests fail. Idempotent."""
        with self._lock:
            self.closed = True
            running, self._process = self._process, None
        self._pending.close()
        if running is not None:
            running.end()

    def _send(
        self, head: dict[str, Any], frames: Sequence[Frame], sent: Callable[[], None] | None = None
    ) -> str | None:
        """Start the process if need be, and queue a message; the reason if that cannot be done."""
        with self._lock:
            if self.closed:
                return "the link is closed"
            if self._process is None:
                if time.monotonic() < self._not_before:
                    return self._problem
                self._not_before = time.monotonic() + _RETRY_SECONDS
                self._process = _RelayProcess(
                    self._cluster, self._max_inflight, self._received, self._ended, self._most_bytes
                )
            self._process.outgoing.put((head, frames, sent))
        return None

    def _most_bytes(self, head: Mapping[str, Any]) -> int | None:
        """Bytes that may come with a head: none with an answer that nobody waits for any more."""
        number = head.get("id")
        return self._most.get(number, 0) if isinstance(number, int) else None

    def _received(self, head: dict[str, Any], frames: list[Frame]) -> None:
        number = head.get("id")
        if isinstance(number, int):
            if "error" in head:
                error = printable(str(head["error"]), LONGEST_TEXT)
                known = {"ConfigError": ConfigError, "ReplyError": ReplyError}.get(str(head.get("kind")))
                self._pending.fail(number, error if known is None else known(error))
            else:
                self._pending.answer(number, (head, frames))
        elif (notify := self.served.get(str(head.get("actor")))) is not None:
            notify(head, frames)

    def _ended(self, running: _RelayProcess, why: str) -> None:
        with self._lock:
            mine = self._process is running
            if mine:
                self._process, self._problem = None, why
        if mine:
            self._pending.fail_all(why)
            for notify in list(self.served.values()):
                notify({"op": "lost", "why": why}, [])

    def _close_if_unused(self) -> None:
        with _shared_lock:  # so that no user is added meanwhile
            idle = not self._users
            self.closed = self.closed or idle
        if idle:
            self.close()


class _RelayProcess:
    """A relay process from its start to its end, and the threads that write to it and read from it."""

    def __init__(
        self,
        cluster: str | None,
        max_inflight: int,
        received: Notify,
        ended: Callable[[_RelayProcess, str], None],
        most_bytes: Callable[[Mapping[str, Any]], int | None],
    ) -> None:
        here, there = socket_pair()
        self._channel = Channel(here, most_bytes)
        self._received, self._ended = received, ended
        self.outgoing: queue.SimpleQueue[tuple[dict[str, Any], Sequence[Frame], Callable[[], None] | None] | None]
        self.outgoing = queue.SimpleQueue()
        # What a cluster sends can run code in the relay, as this user: it must not read this process.
        hide_process()
        # In a session of its own Ctrl-C does not reach it.
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
        self.pid = self._process.pid
        there.close()
        self._ending = False
        self._join_timer = threading.Timer(_JOIN_SECONDS, self._process.kill)
        self._join_timer.daemon = True
        self._join_timer.start()
        self.outgoing.put(({"cluster": cluster, "max_inflight": max_inflight}, (), None))
        for target, name in ((self._write, "write"), (self._read, "read")):
            threading.Thread(target=target, name=f"ciphertune-ray-{name}", daemon=True).start()

    def end(self) -> None:
        """Close the channel, which ends the process, and wait for that."""
        self._ending = True
        self._channel.close()
        self.outgoing.put(None)
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self) -> None:
        while (item := self.outgoing.get()) is not None:
            head, frames, sent = item
            # The reading thread notices that the relay is gone.
            with contextlib.suppress(OSError):
                self._channel.send(head, frames)
            if sent is not None:
                sent()
            del item, frames, sent  # not kept until the next one comes

    def _read(self) -> None:
        why = f"the cluster cannot be joined: it did not answer within {_JOIN_SECONDS:g} s"
        try:
            while (message := self._channel.receive()) is not None:
                head, frames = message
                if head.get("op") == "failed":
                    why = f"the cluster cannot be joined: {printable(str(head.get('error')), LONGEST_TEXT)}"
                elif head.get("op") == "joined":
                    self._join_timer.cancel()
                    why = "the relay to the cluster has ended"
                else:
                    self._received(head, frames)
                del message, head, frames
        except ProtocolError as error:
            why = str(error)
        except Exception as error:
            log.exception("reading from the relay failed")
            why = f"reading from the relay failed: {type(error).__name__}"
        self._join_timer.cancel()
        if not self._ending:
            self._channel.close()
            self.outgoing.put(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_SECONDS)
        self._ended(self, why)


_shared: dict[tuple[int, str | None, int], RelayClient] = {}
_shared_lock = threading.Lock()


def shared_relay(cluster: str | None, max_inflight: int) -> RelayClient:
    """The relay that all links and listeners of this process share for a cluster; each releases it in the end."""
    key = (os.getpid(), cluster, max_inflight)  # a forked child has none of its parent's threads
    with _shared_lock:
        if key not in _shared or _shared[key].closed:
            _shared[key] = RelayClient(cluster, max_inflight, linger=_LINGER_SECONDS)
        return _shared[key].acquire()


@atexit.register
def _close_all() -> None:
    for (process, _, _), relay in _shared.items():
        if process == os.getpid():
            relay.close()


def _environment() -> dict[str, str]:
    """The variables that a relay needs; others of this process may hold tokens and passwords."""
    return {name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith(_PREFIXES)}
