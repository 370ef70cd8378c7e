"""The sessions that clients have open at a worker: whose they are, how many there may be, and which are given up."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any

from ciphertune.backend import WorkerHalf
from ciphertune.errors import QuotaError, UnknownSessionError
from ciphertune.worker.usage import SessionRecord

log = logging.getLogger(__name__)

ABSENCE_SECONDS = 15.0
"""Time from which on a session without a connection gives way to one of another client."""
_DEPARTED = 1024
_UNWRITTEN = 10_000

_WHO = "a client is whoever has one key, and without keys all who come from one address are one client"
_MORE = "the worker's operator raises the limit with --max-sessions"


@dataclasses.dataclass(frozen=True)
class SessionLimits:
    """Bounds on the sessions that clients may open.

    Attributes:
        sessions: of one client at a time.
        all_sessions: of all clients together.
        idle_seconds: after which a session that nothing was asked of is closed.
        nbytes: bytes of evaluation keys that the sessions of one client may hold.
        all_nbytes: of all clients together.
        readings: how often one client may read all weights within an hour; 0 to withhold them.
    """

    sessions: int = 4
    all_sessions: int = 256
    idle_seconds: float = 600.0
    nbytes: int = 1 << 30
    all_nbytes: int = 8 << 30
    readings: int = 32


@dataclasses.dataclass
class WorkerSession:
    """An open session.

    Attributes:
        half: the backend's half that evaluates its products.
        groups: what it evaluates, as ``Worker`` prepared it.
        nbytes: memory that counts as its own.
        record: what it used so far; ``record.client`` is the only one that may use it.
        used: when it was used last, on the clock of ``Sessions``.
        busy: products that are evaluated in it now.
        connections: over which its client uses it, as far as the transport tells them apart.
        alone_since: when the last of these ended; None while there is one, or none was known.
        ended: whether it is in the table no more.
        last_closes: whether the product that is evaluated last in it frees its memory, since it ended meanwhile.
    """

    half: WorkerHalf
    groups: list[Any]
    nbytes: int
    record: SessionRecord
    used: float = 0.0
    busy: int = 0
    connections: set[Hashable] = dataclasses.field(default_factory=set)
    alone_since: float | None = None
    ended: bool = False
    last_closes: bool = False

    @property
    def peer(self) -> str:
        """The client that opened it."""
        return self.record.client


class Sessions:
    """The open sessions of a worker.

    A session whose connections have all ended stays: its client may come back. It is given up once its client needs
    room for another; where the room of all clients is used up, once the connection is gone for ``ABSENCE_SECONDS``.
    So no client can end a session of another one that is there.

    Args:
        limits: bounds; they may be replaced, for sessions to come.
        clock: seconds, as ``time.monotonic``.
    """

    def __init__(self, limits: SessionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, WorkerSession] = {}
        self._departed: collections.deque[Hashable] = collections.deque(maxlen=_DEPARTED)
        # Records of sessions that have ended, until somebody takes them.
        self._ended: collections.deque[SessionRecord] = collections.deque(maxlen=_UNWRITTEN)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def nbytes(self) -> int:
        """Bytes that all sessions hold."""
        return sum(session.nbytes for session in list(self._open.values()))

    def of(self, peer: str) -> int:
        """Number of sessions of one client."""
        return sum(session.peer == peer for session in list(self._open.values()))

    def find(self, name: str, peer: str) -> WorkerSession:
        """A client's open session. Raises ``UnknownSessionError``."""
        session = self._open.get(name)
        # Another client's session and one that never was are told apart by nothing.
        if session is None or session.peer != peer:
            raise UnknownSessionError("the session is not open at this worker")
        return session

    @contextlib.contextmanager
    def using(self, session: WorkerSession) -> Iterator[None]:
        """Keep the memory of a session while a product is evaluated in it."""
        with self._lock:
            if session.ended:
                raise UnknownSessionError("the session is not open at this worker")
            session.busy += 1
        try:
            yield
        finally:
            with self._lock:
                session.busy -= 1
                session.used, session.record.last_used = self._clock(), time.time()
                last = session.last_closes and not session.busy
            if last:
                close_half(session.record.backend, session.half)

    def require_room(self, peer: str, nbytes: int) -> None:
        """See to it that a client may open one more session of so many bytes. Raises ``QuotaError``."""
        with self._lock:
            given_up = self._make_room(peer, nbytes)
        self._close(given_up)

    def add(self, session: WorkerSession) -> str:
        """Open a session; return the name by which its client uses it. Raises ``QuotaError``."""
        name = secrets.token_hex(16)
        with self._lock:
            given_up = self._make_room(session.peer, session.nbytes)
            session.used = self._clock()
            self._open[name] = session
        self._close(given_up)
        told = {"client": session.peer, "backend": session.record.backend, "session": session.record.id}
        log.info("session opened", extra={"fields": {**told, "groups": len(session.groups), "bytes": session.nbytes}})
        return name

    def close(self, name: str, peer: str) -> None:
        """Close a client's session as it asked for. Raises ``UnknownSessionError``."""
        self.find(name, peer)
        self._end({name}, "closed by its client")

    def expire(self) -> int:
        """Close sessions that were idle for too long; return their number."""
        oldest = self._clock() - self.limits.idle_seconds
        idle = {name for name, each in list(self._open.items()) if each.used < oldest and not each.busy}
        return self._end(idle, "idle")

    def dismiss(self, peer: str) -> int:
        """Close all sessions of a client that may use this worker no more; return their number."""
        return self._end({name for name, each in list(self._open.items()) if each.peer == peer}, "revoked")

    def stop(self) -> None:
        """Close all sessions."""
        self._end(set(self._open), "the worker stopped")

    def seen(self, name: str, peer: str, connection: Hashable) -> None:
        """Note that a client uses a session over a connection; nothing where it has no such session."""
        with self._lock:
            session = self._open.get(name)
            if connection is None or session is None or session.peer != peer:
                return
            if connection not in self._departed:
                session.connections.add(connection)
                session.alone_since = None
            elif not session.connections and session.alone_since is None:
                session.alone_since = self._clock()

    def left(self, peer: str, connection: Hashable) -> None:
        """Note that a connection of a client has ended."""
        with self._lock:
            self._departed.append(connection)
            for session in self._open.values():
                if session.peer == peer and connection in session.connections:
                    session.connections.discard(connection)
                    if not session.connections:
                        session.alone_since = self._clock()

    def count(self, name: str, peer: str, nbytes: tuple[int, int], seconds: float, error: bool) -> None:
        """Add a product to what a session used.

        Args:
            name: of the session; nothing is counted where the client has none of this name.
            peer: the client.
            nbytes: of the request and of the answer.
            seconds: of evaluation.
            error: whether the answer was an error.
        """
        with self._lock:
            session = self._open.get(name)
            if session is None or session.peer != peer:
                return
            record = session.record
            record.products += 1
            record.errors += error
            record.bytes_in += nbytes[0]
            record.bytes_out += nbytes[1]
            record.evaluate_seconds += seconds

    def take_records(self) -> list[SessionRecord]:
        """Copies of the records of all open sessions, and of those that have ended since the last call."""
        with self._lock:
            ended = list(self._ended)
            self._ended.clear()
            return [*ended, *(dataclasses.replace(each.record) for each in self._open.values())]

    def _end(self, names: Collection[str], why: str) -> int:
        with self._lock:
            taken = [session for name in names if (session := self._take(name, why)) is not None]
        self._close(taken)
        return len(taken)

    def _take(self, name: str, why: str) -> WorkerSession | None:
        """Take a session out of the table; the caller holds the lock, and closes it."""
        session = self._open.pop(name, None)
        if session is not None:
            session.ended, session.last_closes = True, session.busy > 0
            session.record.ended, session.record.why = time.time(), why
            self._ended.append(session.record)
        return session

    @staticmethod
    def _close(sessions: Collection[WorkerSession]) -> None:
        for session in sessions:
            used = dataclasses.asdict(session.record)
            told = ("client", "backend", "why", "products", "errors", "bytes_in", "bytes_out")
            fields = {"session": used["id"], **{name: used[name] for name in told}}
            fields["evaluate_seconds"] = round(used["evaluate_seconds"], 3)
            log.info("session ended", extra={"fields": fields})
            if not session.last_closes:
                close_half(session.record.backend, session.half)

    def _make_room(self, peer: str, nbytes: int) -> list[WorkerSession]:
        """Take sessions out that give way to one more; the caller holds the lock. Raises ``QuotaError``."""
        alone = [
            (name, each, each.alone_since)
            for name, each in self._open.items()
            if each.alone_since is not None and not each.busy
        ]
        now = self._clock()
        own = sorted((since, name) for name, each, since in alone if each.peer == peer)
        others = sorted(
            (since, name) for name, each, since in alone if each.peer != peer and since <= now - ABSENCE_SECONDS
        )
        without: list[str] = []
        while refusal := self._refusal(peer, nbytes, without):
            text, of_all = refusal
            queue = own or (others if of_all else [])
            if not queue:
                raise QuotaError(text)
            without.append(queue.pop(0)[1])
        taken = [self._take(name, "its connection had ended, and the room was needed") for name in without]
        return [session for session in taken if session is not None]

    def _refusal(self, peer: str, nbytes: int, without: Collection[str]) -> tuple[str, bool] | None:
        """Why a client may not open one more session, and whether that is for the room of all clients."""
        limits = self.limits
        sessions = [each for name, each in self._open.items() if name not in without]
        mine = [session for session in sessions if session.peer == peer]
        later = f"idle sessions are closed after {limits.idle_seconds:g} s"
        if len(mine) >= limits.sessions or len(sessions) >= limits.all_sessions:
            text = f"{len(mine)} sessions of this client and {len(sessions)} in all are open, and no more may be"
            return f"{text} ({_WHO}); {later}, and {_MORE}", len(mine) < limits.sessions
        held, all_held = (sum(session.nbytes for session in some) for some in (mine, sessions))
        if held + nbytes > limits.nbytes or all_held + nbytes > limits.all_nbytes:
            text = (
                f"a session with {nbytes / 1e6:.0f} MB of keys is more than this worker has room for: sessions of this "
                f"client hold {held / 1e6:.0f} of {limits.nbytes / 1e6:.0f} MB, those of all "
                f"{all_held / 1e6:.0f} of {limits.all_nbytes / 1e6:.0f} MB; {later}"
            )
            return text, held + nbytes <= limits.nbytes
        return None


def close_half(backend: str, half: WorkerHalf) -> None:
    """Free what a backend keeps for a session; a backend that fails in it is named in the log."""
    try:
        half.close()
    except Exception as error:
        log.error("backend %r cannot close a session", backend, exc_info=error)
