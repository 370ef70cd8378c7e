"""The worker: holds weights, answers requests, sees only what clients send it. Knows no transport."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ciphertune._support.own_modes import own_modes
from ciphertune.backend import DIRECTIONS, Backend, Buffers, Direction, Joint, WorkerHalf
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
from ciphertune.weights import DIGEST_ROWS, LARGEST_READING
from ciphertune.worker.holdings import Holding, Holdings, Prepared
from ciphertune.worker.readings import Readings
from ciphertune.worker.sessions import SessionLimits, Sessions, WorkerSession, close_half
from ciphertune.worker.store import WeightStore
from ciphertune.worker.usage import SessionRecord

log = logging.getLogger(__name__)

_SHORT_SECONDS = 0.001
_DISTURBED = 10
"""How many times as long a short product may take where the system runs other threads meanwhile."""
_ROWS: tuple[tuple[str, type], ...] = (("layer", str), ("start", int), ("stop", int))


@dataclasses.dataclass
class _Group:
    """A group of layers as its session evaluates it, and what holds its memory.

    Attributes:
        prepared: by the backend's half.
        owner: of its memory.
        rows: of what the owner holds, where other sessions use it too; None where it is this session's own.
        short: bytes of requests that were evaluated in less than a millisecond, the largest, by direction.
    """

    prepared: Any
    owner: Prepared
    rows: tuple[int, int] | None = None
    short: dict[Direction, int] = dataclasses.field(default_factory=dict)

    def timed(self, direction: Direction, nbytes: int, seconds: float, computed: float) -> None:
        """Note how long a request of so many bytes took, and how long this thread computed for it."""
        known = self.short.get(direction, -1)
        if seconds < _SHORT_SECONDS:
            self.short[direction] = max(known, nbytes)
        elif computed >= _SHORT_SECONDS or seconds >= _DISTURBED * _SHORT_SECONDS:
            self.short[direction] = min(known, nbytes - 1)

    @property
    def piece(self) -> tuple[int, tuple[int, int] | None]:
        """What sessions that evaluate the same rows have in common, as long as one of them is open."""
        return id(self.owner), self.rows


class Foreseen(NamedTuple):
    """What is known of a reply beforehand.

    Attributes:
        reply_bytes: of its buffers; 0 where they are not known.
        short: whether requests like this one were evaluated in less than a millisecond so far.
    """

    reply_bytes: int = 0
    short: bool = False


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
        held: all that it holds: ``weights``, until it is told to hold others.
        opened: the open sessions.

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
        self._backends: tuple[str, ...] | None = None
        self.offer(backends)
        self.weights = weights
        self.device = torch.device(device)
        self.opened = Sessions(limits if limits is not None else SessionLimits(), clock)
        self.held = Holdings({"": weights})
        self._preparing = threading.Lock()
        self._readings = Readings(clock)
        self._operations = {
            "hello": self._hello,
            "manifest": self._manifest,
            "weights": self._weights,
            "open": self._open,
            "evaluate": self._evaluate,
            "close": self._close,
        }

    @own_modes()
    def handle(self, request: Message, peer: str = "", pause: Callable[[], object] | None = None) -> Message:
        """Answer one request. Never raises; errors are replies of kind ``error``.

        Args:
            request: what was asked.
            peer: who asked, as the transport authenticated it. A session serves only the client that opened it.
            pause: called in the course of a long product, to do something else meanwhile.
        """
        operation = self._operations.get(request.kind)
        try:
            if operation is None:
                raise ProtocolError(f"{request.kind!r} is not a request")
            if request.kind == "evaluate" and pause is not None:
                reply = self._evaluate(request, peer, pause)
            else:
                reply = operation(request, peer)
        except (Exception, SystemExit) as error:
            reply = _error_reply(request.kind, error)
        reply.version = HELLO_VERSION if request.kind == "hello" else request.version
        return reply

    @own_modes()
    def handle_together(self, requests: Sequence[tuple[Message, str]]) -> list[Message]:
        """Answer requests for products that ``joint`` gave one key for, at once, each to the client that asked.

        Where that is not possible, or fails, each is answered by itself, so that a fault stays with whoever sent it.
        """
        try:
            results, seconds = self._evaluate_together(requests)
        except (Exception, SystemExit) as error:
            log.info("products that were to be evaluated together are evaluated one by one", exc_info=error)
            return [self.handle(request, peer) for request, peer in requests]
        replies = [Message("ok", {"seconds": seconds}, buffers) for buffers in results]
        for reply, (request, _) in zip(replies, requests, strict=True):
            reply.version = request.version
        return replies

    def joint(self, request: Message, peer: str) -> Joint | None:
        """How a request for a product can be evaluated together with others that wait; None for alone."""
        try:
            session, group, direction = self._asked(request, peer)
            # What is prepared for one session alone may hold something of it.
            stated = session.half.joint(group.prepared, direction, request.buffers) if group.rows is not None else None
        except CipherTuneError:
            return None  # which is refused
        except Exception as error:
            log.error("a backend cannot state how a product can be evaluated", exc_info=error)
            return None
        if stated is None:
            return None
        return stated._replace(key=(session.record.backend, session.half.form, group.piece, direction, stated.key))

    def offer(self, backends: Collection[str] | None) -> None:
        """Let clients ask for these backends from now on, None for all that are installed. Raises ``PluginError``."""
        for name in backends or ():
            registry.load(registry.BACKENDS, name)
        self._backends = None if backends is None else tuple(sorted(set(backends)))

    @property
    def limits(self) -> SessionLimits:
        """Bounds on clients' sessions."""
        return self.opened.limits

    @property
    def session_bytes(self) -> int:
        """Bytes of keys that open sessions hold."""
        return self.opened.nbytes

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self.opened)

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the backends that clients may ask for."""
        return self._backends if self._backends is not None else tuple(sorted(registry.installed(registry.BACKENDS)))

    @property
    def prepared_bytes(self) -> int:
        """Memory of prepared weights beside the weights themselves."""
        return sum(prepared.nbytes for held in self.held for prepared in list(held.prepared.values()))

    def foresee(self, request: Message, peer: str) -> Foreseen:
        """What is known of the reply to a request before anything is evaluated."""
        if request.kind == "weights":
            return Foreseen(LARGEST_READING)
        if request.kind != "evaluate":
            return Foreseen()
        try:
            session, group, direction = self._asked(request, peer)
        except CipherTuneError:
            return Foreseen()  # it is refused
        short = request.nbytes <= group.short.get(direction, -1)
        try:
            stated: object = session.half.reply_bytes(group.prepared, direction, request.buffers)
        except Exception as error:
            # On a thread of the listener, who serves others too.
            log.error("backend %r cannot state the size of a reply", session.record.backend, exc_info=error)
            return Foreseen(0, short)
        return Foreseen(stated if isinstance(stated, int) and stated > 0 else 0, short)

    def sessions_of(self, peer: str) -> int:
        """Number of sessions that one client has open."""
        return self.opened.of(peer)

    @own_modes()
    def expire(self) -> int:
        """Close sessions that were idle for too long; return their number."""
        return self.opened.expire()

    @own_modes()
    def dismiss(self, peer: str) -> int:
        """Close all sessions of a client that may use this worker no more; return their number."""
        return self.opened.dismiss(peer)

    def _hello(self, request: Message, peer: str) -> Message:
        return Message(
            "ok",
            {
                "versions": spoken_versions(),
                "backends": list(self.offered),
                "device": self.device.type,
                "layers": self.held.layers,
                "holdings": self.held.chosen(request).digest,
                "bundles": [held.digest for held in self.held],
            },
        )

    def _manifest(self, request: Message, peer: str) -> Message:
        return Message("ok", {"blocks": self.held.chosen(request).blocks})

    def _weights(self, request: Message, peer: str) -> Message:
        """Some rows of a layer, as a client reads them that prepares itself from the codes."""
        name, start, stop = (_field(request, field, kind) for field, kind in _ROWS)
        if self.limits.readings == 0:
            raise WithheldError("this worker does not let its weights be read")
        weights = self.held.chosen(request).weights
        if stop - start > DIGEST_ROWS and stop - start > LARGEST_READING // weights.row_bytes(name):
            raise ProtocolError(f"rows {start} to {stop} of {name!r} are more than one reply carries")
        codes = weights.rows(name, start, stop)
        self._readings.count(peer, codes.nbytes, self.limits.readings * self.held.nbytes)
        return Message("ok", {}, {"codes": codes})

    def _open(self, request: Message, peer: str) -> Message:
        name = _field(request, "backend", str)
        groups = _field(request, "groups", list)
        public = _field(request, "public", dict)
        held = self.held.chosen(request)
        for group in groups:
            if not (isinstance(group, list) and group and all(isinstance(layer, str) for layer in group)):
                raise ProtocolError("a group is not a list of layer names")
        if len(groups) > 2 * len(held.weights) or sum(map(len, groups)) > 3 * len(held.weights):
            raise ProtocolError(f"{len(groups)} groups are more than {len(held.weights)} layers can form")
        if self._backends is not None and name not in self._backends:
            raise PluginError(
                f"this worker does not offer the backend {name!r}; it offers {', '.join(self._backends)} (its operator "
                "chooses with 'ciphertune worker --backends')"
            )
        # Before the backend allocates anything for it.
        self.opened.require_room(peer, request.nbytes)
        backend: type[Backend] = registry.get_backend(name)
        with _blamed(name, "making its worker half"):
            half: object = backend.worker(public, request.buffers, self.device)
        if not isinstance(half, WorkerHalf):
            raise _BackendFaultError(name, f"gave a {type(half).__name__} and no ciphertune.backend.WorkerHalf")
        try:
            with _blamed(name, "preparing weights"):
                prepared = [self._prepare(half, name, held, tuple(group)) for group in groups]
            # What one session alone uses counts as its own.
            own = {id(group.owner): group.owner.nbytes for group in prepared if group.rows is None}
            nbytes = max(request.nbytes, half.nbytes) + sum(own.values())
            record = SessionRecord(peer, held.name, name, time.time(), time.time())
            return Message("ok", {"session": self.opened.add(WorkerSession(half, prepared, nbytes, record))})
        except BaseException:
            close_half(name, half)
            raise

    def _prepare(self, half: WorkerHalf, backend: str, held: Holding, layers: tuple[str, ...]) -> _Group:
        matrix = held.weights.matrix(layers)
        with self._preparing:
            if half.divisible:
                block, start, stop = held.weights.place(layers)
                whole = self._once(half, held, (backend, half.form, block), held.weights.block(block))
                return _Group(half.part(whole.value, start, stop), whole, (start, stop))
            alone = self._once(half, held, (backend, half.form, layers), matrix)
            return _Group(alone.value, alone)

    @staticmethod
    def _once(half: WorkerHalf, held: Holding, key: tuple[str, Hashable, Hashable], weight: Tensor) -> Prepared:
        prepared = held.prepared.get(key)
        if prepared is None:
            value = half.prepare(weight)
            prepared = Prepared(value, half.prepared_nbytes(value))
            held.prepared[key] = prepared
        return prepared

    def _evaluate(self, request: Message, peer: str, pause: Callable[[], object] | None = None) -> Message:
        session, group, direction = self._asked(request, peer)
        paused = 0.0

        def pausing() -> None:
            nonlocal paused
            begun = time.perf_counter()
            assert pause is not None
            pause()
            paused += time.perf_counter() - begun

        with self.opened.using(session):
            start, computed = time.perf_counter(), time.thread_time()
            with _blamed(session.record.backend, "evaluation"):
                if pause is None:
                    buffers = session.half.evaluate(group.prepared, direction, request.buffers)
                else:
                    buffers = session.half.evaluate_in_parts(group.prepared, direction, request.buffers, pausing)
            seconds, computed = time.perf_counter() - start - paused, time.thread_time() - computed
        group.timed(direction, request.nbytes, seconds, computed)
        if why := buffers_fault(buffers):
            raise _BackendFaultError(session.record.backend, f"the result of its evaluation {why}")
        return Message("ok", {"seconds": seconds}, buffers)

    def _evaluate_together(self, requests: Sequence[tuple[Message, str]]) -> tuple[list[Buffers], float]:
        """The results of several requests, and the seconds that all of them took."""
        places = [self._asked(request, peer) for request, peer in requests]
        first, group, direction = places[0]
        # The queue's keys say so as well, but for a piece that is gone meanwhile.
        if any(
            (other.record.backend, other.half.form, its.piece, way)
            != (first.record.backend, first.half.form, group.piece, direction)
            for other, its, way in places
        ):
            raise ProtocolError("the requests are not for the same piece")
        with contextlib.ExitStack() as stack:
            for session, _, _ in places:
                stack.enter_context(self.opened.using(session))
            start = time.perf_counter()
            buffers = [request.buffers for request, _ in requests]
            results = first.half.evaluate_together(group.prepared, direction, buffers)
            seconds = time.perf_counter() - start
        if len(results) != len(requests) or any(buffers_fault(result) for result in results):
            raise _BackendFaultError(first.record.backend, "a result of an evaluation cannot be sent")
        return results, seconds

    def _asked(self, request: Message, peer: str) -> tuple[WorkerSession, _Group, Direction]:
        """The session of a request for a product, the group, and the direction."""
        session = self.opened.find(_field(request, "session", str), peer)
        index = _field(request, "group", int)
        direction: Direction = _field(request, "direction", str)
        if not 0 <= index < len(session.groups):
            raise ProtocolError(f"group {index} is not one of the {len(session.groups)} that the session opened")
        if direction not in DIRECTIONS:
            raise ProtocolError("the direction is neither forward nor backward")
        return session, session.groups[index], direction

    def _close(self, request: Message, peer: str) -> Message:
        self.opened.close(_field(request, "session", str), peer)
        return Message("ok")


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
