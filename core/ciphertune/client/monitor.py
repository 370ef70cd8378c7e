"""Ask workers how they are: what ``ciphertune top`` shows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from ciphertune._support.options import build_options, split_options
from ciphertune._support.suggestions import closest
from ciphertune.client.choice import SessionOptions
from ciphertune.client.connection import Retry, WorkerConnection
from ciphertune.errors import (
    CipherTuneError,
    PluginError,
    SelectionError,
    TransportTimeoutError,
)
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.selection import Selection
from ciphertune.transport import Link, Transport

_TEXT = 40


@dataclasses.dataclass(frozen=True)
class Own:
    """What this client itself uses of a worker; sums begin when it comes, or comes again after a long absence.

    Attributes:
        sessions, under_way: now.
        products, errors, bytes_in, bytes_out, evaluate_seconds: sums.
    """

    sessions: int | None = None
    under_way: int | None = None
    products: int | None = None
    errors: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    evaluate_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class WorkerState:
    """One worker at one moment. What it did not say, or said in a form that makes no sense, is None.

    Attributes:
        worker: its address.
        state: ``up``, ``draining``, or ``silent`` where it does not answer.
        problem: why it is silent.
        latency: seconds that its answer took.
        version, device, layers, weight_bytes, evaluators, uptime_seconds: of the worker.
        busy: share of the last seconds in which it evaluated, 0 to 1.
        sessions, clients, queued, under_way: of all clients.
        bytes_in_per_second, bytes_out_per_second: of all clients, in whole megabytes.
        own: of this client alone.
        products_per_second: of this client alone, since the last time it was asked.
    """

    worker: str
    state: str
    problem: str = ""
    latency: float | None = None
    version: str | None = None
    device: str | None = None
    layers: int | None = None
    weight_bytes: int | None = None
    evaluators: int | None = None
    uptime_seconds: float | None = None
    busy: float | None = None
    sessions: int | None = None
    clients: int | None = None
    queued: int | None = None
    under_way: int | None = None
    bytes_in_per_second: float | None = None
    bytes_out_per_second: float | None = None
    own: Own = dataclasses.field(default_factory=Own)
    products_per_second: float | None = None


class _Watched:
    """One worker, and how many products it had answered when it was last asked."""

    def __init__(self, link: Link) -> None:
        self.connection = WorkerConnection(link)
        self.before: tuple[float, int] | None = None


class Watch:
    """Connections to workers, to ask them how they are. Opens no session and sends no data.

    Args:
        url: ``transport://[endpoint,…][?option=value&…]``, or a selection string as for training, whose backend's
            options play no part.

    Raises:
        SelectionError: the URL names no workers, or an unknown transport or option.
        PluginError, KeyFileError, SecurityError, TransportError: no connection can be made as it asks for.
    """

    def __init__(self, url: str) -> None:
        transport, endpoints = transport_of(url)
        self._workers = [_Watched(link) for link in transport.connect(endpoints, None)]

    @property
    def names(self) -> list[str]:
        """Where the workers are."""
        return [worker.connection.name for worker in self._workers]

    def look(self, timeout: float = 2.0) -> list[WorkerState]:
        """Ask all of them; returns once all have answered, or after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        problems: dict[_Watched, str] = {}
        replies: dict[_Watched, tuple[Message, float]] = {}
        asked = {_ask(worker): (worker, time.monotonic()) for worker in self._workers}
        while asked:
            done, _ = wait(asked, max(0.0, end - time.monotonic()), FIRST_COMPLETED)
            for future in done or list(asked):
                worker, since = asked.pop(future)
                connection = worker.connection
                try:
                    if connection.version is None:
                        connection.greeted(connection.reply(future, 0, "hello"))
                        asked[_ask(worker)] = worker, time.monotonic()
                    else:
                        replies[worker] = connection.reply(future, 0, "stats"), time.monotonic() - since
                except TransportTimeoutError:
                    problems[worker] = "no answer"
                except (CipherTuneError, Retry) as error:
                    problems[worker] = str(error).removeprefix(f"{connection.name}: ")
        found = []
        for worker in self._workers:
            if worker in replies:
                found.append(_state(worker, *replies[worker]))
            else:
                worker.connection.version = worker.before = None  # it may be another one when it comes back
                problem = plain(problems.get(worker, "no answer"), 200)
                found.append(WorkerState(worker.connection.name, "silent", problem))
        return found

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        for worker in self._workers:
            worker.connection.link.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(worker: _Watched) -> Future[Message]:
    """Ask which version to speak and, once that is agreed, for figures."""
    connection = worker.connection
    return connection.hello() if connection.version is None else connection.submit(Message("stats"))


def _state(worker: _Watched, reply: Message, latency: float) -> WorkerState:
    fields = reply.fields
    told = fields.get("own")
    own = Own(**_figures(Own, _names(Own), told if isinstance(told, dict) else {}))
    rate, now = None, time.monotonic()
    if own.products is not None:
        if worker.before is not None and own.products >= worker.before[1] and now > worker.before[0]:
            rate = (own.products - worker.before[1]) / (now - worker.before[0])
        worker.before = now, own.products
    known = _figures(WorkerState, _TOLD, fields)
    if "busy" in known:
        known["busy"] = min(1.0, known["busy"])
    for name in ("version", "device"):
        text = fields.get(name)
        known[name] = plain(text, _TEXT) if isinstance(text, str) else None
    return WorkerState(
        worker=worker.connection.name,
        state="draining" if fields.get("draining") is True else "up",
        latency=latency,
        own=own,
        products_per_second=rate,
        **known,
    )


def transport_of(url: str) -> tuple[Transport, tuple[str, ...]]:
    """The transport that a URL names, with its options, and the endpoints.

    Raises:
        SelectionError, PluginError: see ``Watch``.
    """
    selection = Selection.parse(url)
    scheme = url.strip().partition("?")[0].partition("://")[0]
    name = selection.transport
    owners: list[type] = [SessionOptions]
    if "+" not in scheme and "://" in url:
        name = selection.backend
        remote = _remote_transports()
        if name not in remote:
            raise SelectionError(
                f"{name!r} is no transport that reaches workers elsewhere; {closest(name, remote)}. Write "
                "TRANSPORT://HOST:PORT or BACKEND+TRANSPORT://HOST:PORT"
            )
    else:
        owners.append(registry.load(registry.BACKENDS, selection.backend).Options)
    cls: type[Transport] = registry.load(registry.TRANSPORTS, name)
    if not cls.remote:
        raise SelectionError(
            f"{url!r} names no workers elsewhere: with {name!r} the worker is in the client's process. Write "
            "TRANSPORT://HOST:PORT or BACKEND+TRANSPORT://HOST:PORT"
        )
    # A name that both know is the transport's here.
    of_transport, *_ = split_options(selection.options, cls.Options, *owners)
    return cls(build_options(cls.Options, of_transport)), selection.endpoints


def plain(text: str, limit: int) -> str:
    r"""Text from a stranger as it may go to a terminal: printable, on one line, and not too long.

    >>> plain("1.0\x1b[2J" + 50 * "x", 12)
    '1.0�[2Jxxxx…'
    """
    shown = "".join(c if c.isprintable() else "�" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _remote_transports() -> list[str]:
    names = []
    for name, row in registry.installed(registry.TRANSPORTS).items():
        try:
            if row.load().remote:
                names.append(name)
        except PluginError:  # which its user is told when naming it
            names.append(name)
    return names


def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


_TOLD = (
    *("layers", "weight_bytes", "evaluators", "uptime_seconds", "busy"),
    *("sessions", "clients", "queued", "under_way", "bytes_in_per_second", "bytes_out_per_second"),
)
"""Figures that a worker tells of itself."""


def _figures(cls: type, names: Iterable[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the names that have a finite number, not below 0, and whole where the dataclass says so."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    known = {}
    for name in names:
        value = fields.get(name)
        whole = kinds[name].startswith("int")
        if isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and 0 <= value < 2**63:
            known[name] = value
    return known
