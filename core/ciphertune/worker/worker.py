"""The worker: holds weights, answers requests, sees only what clients send it. Knows no transport."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from ciphertune._support.own_modes import own_modes
from ciphertune.backend import DIRECTIONS, Backend, Direction, WorkerHalf
from ciphertune.errors import (
    CipherTuneError,
    HoldingsError,
    PluginError,
    ProtocolError,
    QuotaError,
    SelectionError,
    UnknownLayerError,
    UnknownSessionError,
    WithheldError,
)
from ciphertune.plugins import registry
from ciphertune.protocol import HELLO_VERSION, Message, buffers_fault, error_message, spoken_versions
from ciphertune.weights import DIGEST_ROWS, LARGEST_READING, holdings_digest
from ciphertune.worker.readings import Readings
from ciphertune.worker.store import WeightStore

log = logging.getLogger(__name__)

_ROWS: tuple[tuple[str, type], ...] = (("layer", str), ("start", int), ("stop", int))


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


class _Prepared:
    """Weights that a backend prepared; sessions of one form share them while one is open.

    Attributes:
        value: what the backend's half made.
        nbytes: memory beside the weights.
    """

    def __init__(self, value: Any, nbytes: int) -> None:
        self.value = value
        self.nbytes = nbytes


@dataclasses.dataclass
class _Group:
    """A group of layers as its session evaluates it, and what holds its memory."""

    prepared: Any
    owner: _Prepared
    shared: bool


@dataclasses.dataclass
class _WorkerSession:
    peer: str
    backend: str
    half: WorkerHalf
    groups: list[_Group]
    used: float
    nbytes: int
    busy: int = 0


class Worker:
    """Worker that serves the layers of a weight store to any number of sessions.

    Every message is answered; a request that cannot be served gets an ``error`` reply and changes nothing.

    Args:
        weights: the layers this worker serves; what it holds must not change any more.
        device: where products are evaluated.
        limits: bounds on clients' sessions.
        clock: seconds, as ``time.monotonic``; by it sessions expire.
        backends: names of those that clients may ask for; None for all that are installed.

    Attributes:
        weights, device, limits: as given.

    Raises:
        PluginError: a backend that is to be offered is not installed, or not usable.
    """

    def __init__(
        self,
        weights: WeightStore,
        device: torch.device | str = "cpu",
        limits: SessionLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        backends: Collection[str] | None = None,
    ) -> None:
        self._backends = None if backends is None else tuple(sorted(set(backends)))
        for name in self._backends or ():
            registry.load(registry.BACKENDS, name)
        self.weights = weights
        self.device = torch.device(device)
        self.limits = limits if limits is not None else SessionLimits()
        self._clock = clock
        self._blocks = weights.manifest()
        self._holdings = holdings_digest(self._blocks)
        self._sessions: dict[str, _WorkerSession] = {}
        # By backend, form, and the block or the layers.
        self._prepared: weakref.WeakValueDictionary[tuple[str, Hashable, Hashable], _Prepared] = (
            weakref.WeakValueDictionary()
        )
        self._preparing = threading.Lock()
        self._lock = threading.Lock()
        self._readings = Readings(self.limits.readings * weights.nbytes, clock)
        self._operations = {
            "hello": self._hello,
            "manifest": self._manifest,
            "weights": self._weights,
            "open": self._open,
            "evaluate": self._evaluate,
            "close": self._close,
        }

    @own_modes()
    def handle(self, request: Message, peer: str = "") -> Message:
        """Answer one request. Never raises; errors are replies of kind ``error``.

        Args:
            request: what was asked.
            peer: who asked, as the transport authenticated it. A session serves only the client that opened it.
        """
        operation = self._operations.get(request.kind)
        try:
            if operation is None:
                raise ProtocolError(f"{request.kind!r} is not a request")
            reply = operation(request, peer)
        except (Exception, SystemExit) as error:
            reply = _error_reply(request.kind, error)
        reply.version = HELLO_VERSION if request.kind == "hello" else request.version
        return reply

    @property
    def session_bytes(self) -> int:
        """Bytes of keys that open sessions hold."""
        return sum(session.nbytes for session in list(self._sessions.values()))

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the backends that clients may ask for."""
        return self._backends if self._backends is not None else tuple(sorted(registry.installed(registry.BACKENDS)))

    @property
    def prepared_bytes(self) -> int:
        """Memory of prepared weights beside the weights themselves."""
        return sum(prepared.nbytes for prepared in list(self._prepared.values()))

    def reply_bytes(self, request: Message, peer: str) -> int:
        """Bytes of buffers of the reply to a request, before anything is evaluated; 0 where they are not known."""
        if request.kind == "weights":
            return LARGEST_READING
        session = self._sessions.get(str(request.fields.get("session")))
        if request.kind != "evaluate" or session is None or session.peer != peer:
            return 0
        index, direction = request.fields.get("group"), request.fields.get("direction")
        if type(index) is not int or not 0 <= index < len(session.groups) or direction not in DIRECTIONS:
            return 0  # which is refused
        try:
            stated: object = session.half.reply_bytes(session.groups[index].prepared, direction, request.buffers)
        except Exception as error:
            # On a thread of the listener, who serves others too.
            log.error("backend %r cannot state the size of a reply", session.backend, exc_info=error)
            return 0
        return stated if isinstance(stated, int) and stated > 0 else 0

    def sessions_of(self, peer: str) -> int:
        """Number of sessions that one client has open."""
        return sum(session.peer == peer for session in list(self._sessions.values()))

    @own_modes()
    def expire(self) -> int:
        """Close sessions that were idle for too long; return their number."""
        oldest = self._clock() - self.limits.idle_seconds
        with self._lock:
            idle = [name for name, session in self._sessions.items() if session.used < oldest and not session.busy]
            closed = [self._sessions.pop(name) for name in idle]
        for session in closed:
            _close(session.backend, session.half)
        return len(closed)

    def _hello(self, request: Message, peer: str) -> Message:
        return Message(
            "ok",
            {
                "versions": spoken_versions(),
                "backends": list(self.offered),
                "device": self.device.type,
                "layers": len(self.weights),
                "holdings": self._holdings,
            },
        )

    def _manifest(self, request: Message, peer: str) -> Message:
        return Message("ok", {"blocks": self._blocks})

    def _weights(self, request: Message, peer: str) -> Message:
        """Some rows of a layer, as a client reads them that prepares itself from the codes."""
        name, start, stop = (_field(request, field, kind) for field, kind in _ROWS)
        if self.limits.readings == 0:
            raise WithheldError("this worker does not let its weights be read")
        if stop - start > DIGEST_ROWS and stop - start > LARGEST_READING // self.weights.row_bytes(name):
            raise ProtocolError(f"rows {start} to {stop} of {name!r} are more than one reply carries")
        codes = self.weights.rows(name, start, stop)
        self._readings.count(peer, codes.nbytes)
        return Message("ok", {}, {"codes": codes})

    def _open(self, request: Message, peer: str) -> Message:
        name = _field(request, "backend", str)
        groups = _field(request, "groups", list)
        public = _field(request, "public", dict)
        if request.fields.get("holdings", self._holdings) != self._holdings:
            raise HoldingsError("this worker does not hold what it held when the client asked for its manifest")
        for group in groups:
            if not (isinstance(group, list) and group and all(isinstance(layer, str) for layer in group)):
                raise ProtocolError("a group is not a list of layer names")
        if len(groups) > 2 * len(self.weights) or sum(map(len, groups)) > 3 * len(self.weights):
            raise ProtocolError(f"{len(groups)} groups are more than {len(self.weights)} layers can form")
        if self._backends is not None and name not in self._backends:
            raise PluginError(
                f"this worker does not offer the backend {name!r}; it offers {', '.join(self._backends)} (its operator "
                "chooses with 'ciphertune worker --backends')"
            )
        # Before the backend allocates anything for it.
        self._refuse_more(peer, request.nbytes)
        backend: type[Backend] = registry.get_backend(name)
        with _blamed(name, "making its worker half"):
            half: object = backend.worker(public, request.buffers, self.device)
        if not isinstance(half, WorkerHalf):
            raise _BackendFaultError(name, f"gave a {type(half).__name__} and no ciphertune.backend.WorkerHalf")
        try:
            with _blamed(name, "preparing weights"):
                prepared = [self._prepare(half, name, tuple(group)) for group in groups]
        except BaseException:
            _close(name, half)
            raise
        session_id = secrets.token_hex(16)
        # What one session alone uses counts as its own.
        own = {id(group.owner): group.owner.nbytes for group in prepared if not group.shared}
        nbytes = max(request.nbytes, half.nbytes) + sum(own.values())
        with self._lock:
            self._refuse_more(peer, nbytes)
            self._sessions[session_id] = _WorkerSession(peer, name, half, prepared, self._clock(), nbytes)
        return Message("ok", {"session": session_id})

    def _refuse_more(self, peer: str, nbytes: int) -> None:
        limits, sessions = self.limits, list(self._sessions.values())
        mine = [session for session in sessions if session.peer == peer]
        later = f"idle sessions are closed after {limits.idle_seconds:g} s"
        if len(mine) >= limits.sessions or len(sessions) >= limits.all_sessions:
            raise QuotaError(
                f"{len(mine)} sessions of this client and {len(sessions)} in all are open, and no more may be; {later}"
            )
        held, all_held = (sum(session.nbytes for session in some) for some in (mine, sessions))
        if held + nbytes > limits.nbytes or all_held + nbytes > limits.all_nbytes:
            raise QuotaError(
                f"a session with {nbytes / 1e6:.0f} MB of keys is more than this worker has room for: sessions of this "
                f"client hold {held / 1e6:.0f} of {limits.nbytes / 1e6:.0f} MB, those of all "
                f"{all_held / 1e6:.0f} of {limits.all_nbytes / 1e6:.0f} MB; {later}"
            )

    def _prepare(self, half: WorkerHalf, backend: str, layers: tuple[str, ...]) -> _Group:
        matrix = self.weights.matrix(layers)
        with self._preparing:
            if half.divisible:
                block, start, stop = self.weights.place(layers)
                whole = self._once(half, (backend, half.form, block), self.weights.block(block))
                return _Group(half.part(whole.value, start, stop), whole, shared=True)
            alone = self._once(half, (backend, half.form, layers), matrix)
            return _Group(alone.value, alone, shared=False)

    def _once(self, half: WorkerHalf, key: tuple[str, Hashable, Hashable], weight: Tensor) -> _Prepared:
        prepared = self._prepared.get(key)
        if prepared is None:
            value = half.prepare(weight)
            prepared = _Prepared(value, half.prepared_nbytes(value))
            self._prepared[key] = prepared
        return prepared

    def _evaluate(self, request: Message, peer: str) -> Message:
        session = self._session(request, peer)
        index = _field(request, "group", int)
        direction: Direction = _field(request, "direction", str)
        if not 0 <= index < len(session.groups):
            raise ProtocolError(f"group {index} is not one of the {len(session.groups)} that the session opened")
        if direction not in DIRECTIONS:
            raise ProtocolError("the direction is neither forward nor backward")
        with self._lock:
            session.busy += 1
        start = time.perf_counter()
        try:
            with _blamed(session.backend, "evaluation"):
                buffers = session.half.evaluate(session.groups[index].prepared, direction, request.buffers)
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                session.busy -= 1
                session.used = self._clock()
        if why := buffers_fault(buffers):
            raise _BackendFaultError(session.backend, f"the result of its evaluation {why}")
        return Message("ok", {"seconds": seconds}, buffers)

    def _close(self, request: Message, peer: str) -> Message:
        session = self._session(request, peer)
        with self._lock:
            self._sessions.pop(_field(request, "session", str), None)
        _close(session.backend, session.half)
        return Message("ok")

    def _session(self, request: Message, peer: str) -> _WorkerSession:
        session = self._sessions.get(_field(request, "session", str))
        # Another client's session and one that never was are told apart by nothing.
        if session is None or session.peer != peer:
            raise UnknownSessionError("the session is not open at this worker")
        return session


_CODES: dict[type[CipherTuneError], str] = {
    UnknownSessionError: "unknown-session",
    HoldingsError: "holdings",
    UnknownLayerError: "unknown-layer",
    QuotaError: "quota",
    WithheldError: "withheld",
    ProtocolError: "protocol",
    SelectionError: "protocol",
    PluginError: "plugin",
}


class _BackendFaultError(Exception):
    """A backend failed as none may. The text is for the client, and quotes nothing of the request."""

    def __init__(self, backend: str, what: str) -> None:
        super().__init__(f"{registry.title(registry.BACKENDS, backend)} failed at this worker: {what}")


@contextlib.contextmanager
def _blamed(backend: str, doing: str) -> Iterator[None]:
    """Name the backend in whatever it raises without meaning to; the text of that stays here, as it may quote data."""
    try:
        yield
    except CipherTuneError:
        raise
    except (Exception, SystemExit) as error:
        raise _BackendFaultError(backend, f"{doing} raised {type(error).__name__}") from error


def _close(backend: str, half: WorkerHalf) -> None:
    try:
        half.close()
    except Exception as error:
        log.error("backend %r cannot close a session", backend, exc_info=error)


def _error_reply(kind: str, error: BaseException) -> Message:
    for known, code in _CODES.items():
        if isinstance(error, known):
            return error_message(code, str(error))
    # The text of an unforeseen error may quote data, so only its type leaves the worker.
    log.error("request %s failed", kind, exc_info=error)
    if isinstance(error, _BackendFaultError):
        return error_message("internal", str(error))
    return error_message("internal", f"the worker failed on this request: {type(error).__name__}")


def _field(message: Message, name: str, kind: type) -> Any:
    value = message.fields.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(f"a {message.kind} request needs the field {name!r} ({kind.__name__})")
    return value
