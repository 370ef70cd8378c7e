"""The worker: holds weights, answers requests, sees only what clients send it. Knows no transport."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from typing import Any

import torch

from ciphertune import registry
from ciphertune.backend import Backend, Direction, WorkerHalf
from ciphertune.errors import (
    CipherTuneError,
    PluginError,
    ProtocolError,
    SelectionError,
    UnknownLayerError,
)
from ciphertune.protocol import OLDEST_VERSION, VERSION, Message, error_message
from ciphertune.weights import WeightStore

log = logging.getLogger(__name__)


class _UnknownSessionError(CipherTuneError):
    pass


@dataclasses.dataclass
class _Unit:
    """A group of layers of one session, with the backend's prepared weight."""

    layers: tuple[str, ...]
    prepared: Any


@dataclasses.dataclass
class _WorkerSession:
    half: WorkerHalf
    units: list[_Unit]


@dataclasses.dataclass
class WorkerStats:
    """Counters of one worker since it started. Seconds are of evaluation alone."""

    requests: int = 0
    errors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    evaluate_seconds: float = 0.0


class Worker:
    """Serves the layers of a weight store to any number of sessions.

    Every message is answered; a request that cannot be served gets an ``error`` reply and changes nothing.

    Args:
        weights: the layers this worker serves.
        device: where products are evaluated.
    """

    def __init__(self, weights: WeightStore, device: torch.device | str = "cpu") -> None:
        self.weights = weights
        self.device = torch.device(device)
        self.stats = WorkerStats()
        self._sessions: dict[str, _WorkerSession] = {}
        self._lock = threading.Lock()
        self._operations = {
            "hello": self._hello,
            "manifest": self._manifest,
            "open": self._open,
            "evaluate": self._evaluate,
            "close": self._close,
            "stats": self._stats,
        }

    def handle(self, request: Message) -> Message:
        """Answer one request. Never raises; errors are replies of kind ``error``."""
        operation = self._operations.get(request.kind)
        try:
            if operation is None:
                raise ProtocolError(f"{request.kind!r} is not a request")
            reply = operation(request)
        except _UnknownSessionError as error:
            reply = error_message("unknown-session", str(error))
        except UnknownLayerError as error:
            reply = error_message("unknown-layer", str(error))
        except (ProtocolError, SelectionError) as error:
            reply = error_message("protocol", str(error))
        except PluginError as error:
            reply = error_message("plugin", str(error))
        except Exception as error:
            # The text of an unforeseen error may quote data, so only its type leaves the worker.
            log.exception("request %s failed", request.kind)
            reply = error_message("internal", f"the worker failed on this request: {type(error).__name__}")
        with self._lock:
            self.stats.requests += 1
            self.stats.errors += reply.kind == "error"
            self.stats.bytes_in += request.nbytes
            self.stats.bytes_out += reply.nbytes
        return reply

    def _hello(self, request: Message) -> Message:
        return Message(
            "ok",
            {
                "versions": [OLDEST_VERSION, VERSION],
                "backends": sorted(registry.installed(registry.BACKENDS)),
                "device": self.device.type,
                "layers": len(self.weights),
            },
        )

    def _manifest(self, request: Message) -> Message:
        return Message("ok", {"layers": self.weights.manifest()})

    def _open(self, request: Message) -> Message:
        name = _field(request, "backend", str)
        groups = _field(request, "groups", list)
        public = _field(request, "public", dict)
        for group in groups:
            if not (isinstance(group, list) and group and all(isinstance(layer, str) for layer in group)):
                raise ProtocolError("a group is not a list of layer names")
        backend: type[Backend] = registry.load(registry.BACKENDS, name)
        half = backend.worker(public, request.buffers, self.device)
        with self._lock:
            units = [_Unit(tuple(group), half.prepare(self.weights.stack(tuple(group)))) for group in groups]
            session_id = secrets.token_hex(16)
            self._sessions[session_id] = _WorkerSession(half, units)
        return Message("ok", {"session": session_id})

    def _evaluate(self, request: Message) -> Message:
        session = self._session(request)
        index = _field(request, "unit", int)
        direction: Direction = _field(request, "direction", str)
        if not 0 <= index < len(session.units):
            raise ProtocolError(f"unit {index} is not one of the {len(session.units)} that the session opened")
        if direction not in ("forward", "backward"):
            raise ProtocolError("the direction is neither forward nor backward")
        start = time.perf_counter()
        buffers = session.half.evaluate(session.units[index].prepared, direction, request.buffers)
        seconds = time.perf_counter() - start
        with self._lock:
            self.stats.evaluate_seconds += seconds
        return Message("ok", {"seconds": seconds}, buffers)

    def _close(self, request: Message) -> Message:
        session = self._session(request)
        with self._lock:
            self._sessions.pop(_field(request, "session", str), None)
        session.half.close()
        return Message("ok")

    def _stats(self, request: Message) -> Message:
        with self._lock:
            return Message("ok", {**dataclasses.asdict(self.stats), "sessions": len(self._sessions)})

    def _session(self, request: Message) -> _WorkerSession:
        session = self._sessions.get(_field(request, "session", str))
        if session is None:
            raise _UnknownSessionError("the session is not open at this worker")
        return session


def _field(message: Message, name: str, kind: type) -> Any:
    value = message.fields.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(f"a {message.kind} request needs the field {name!r} ({kind.__name__})")
    return value
