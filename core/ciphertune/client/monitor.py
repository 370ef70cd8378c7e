"""Connections that ask workers for their status: what ``ciphertune top`` shows."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait

from ciphertune._support.options import build_options, split_options
from ciphertune._support.printable import printable
from ciphertune._support.suggestions import closest
from ciphertune.client.connection import Retry, WorkerConnection
from ciphertune.client.exclusions import Exclusions
from ciphertune.errors import (
    CipherTuneError,
    PluginError,
    SelectionError,
    TransportTimeoutError,
)
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed
from ciphertune.protocol import Message
from ciphertune.selection import Selection, SessionOptions
from ciphertune.status import WorkerStatus
from ciphertune.transport import Link, Transport


@dataclasses.dataclass(frozen=True)
class WorkerState:
    """One worker at one moment.

    Attributes:
        worker: its address.
        state: ``up``, ``draining``, or ``silent`` where it does not answer.
        problem: why it is silent.
        latency: seconds that its answer took.
        status: what it said.
        products_per_second: of this client alone, since the last time it was asked.
        excluded: when and why this client asks it for nothing; empty where it does.
    """

    worker: str
    state: str
    problem: str = ""
    latency: float | None = None
    status: WorkerStatus = dataclasses.field(default_factory=WorkerStatus)
    products_per_second: float | None = None
    excluded: str = ""


class _Watched:
    """One worker, and how many products it had answered when it was last asked."""

    def __init__(self, link: Link) -> None:
        self.connection = WorkerConnection(link)
        self.before: tuple[float, int] | None = None


class Watch:
    """Connections to workers that ask for their status. No session is opened and no data sent.

    Args:
        url: ``transport://[endpoint,…][?option=value&…]``, or a selection string as for training, whose backend's
            options play no part.

    Raises:
        SelectionError: the URL names no workers, or an unknown transport or option.
        PluginError, KeyFileError, SecurityError, TransportError: no connection can be made as it asks for.
    """

    def __init__(self, url: str) -> None:
        transport, endpoints = transport_of(url)
        with blamed(registry.TRANSPORTS, type(transport).name, "'connect'"):
            self._workers = [_Watched(link) for link in transport.connect(endpoints, None)]
        self._exclusions = Exclusions()

    @property
    def names(self) -> list[str]:
        """Addresses of the workers."""
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
                problem = printable(problems.get(worker, "no answer"), 200)
                found.append(WorkerState(worker.connection.name, "silent", problem))
        return [self._with_exclusion(*each) for each in zip(found, self._workers, strict=True)]

    def _with_exclusion(self, state: WorkerState, worker: _Watched) -> WorkerState:
        link = worker.connection.link
        found = self._exclusions.of(link.name, link.identity, None)
        return state if found is None else dataclasses.replace(state, excluded=found.text)

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        for worker in self._workers:
            worker.connection.link.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(worker: _Watched) -> Future[Message]:
    """Ask which version to speak and, once that is agreed, for the status."""
    connection = worker.connection
    return connection.hello() if connection.version is None else connection.submit(Message("stats"))


def _state(worker: _Watched, reply: Message, latency: float) -> WorkerState:
    status = WorkerStatus.read(reply.fields)
    rate, now, products = None, time.monotonic(), status.own.products
    if products is not None:
        if worker.before is not None and products >= worker.before[1] and now > worker.before[0]:
            rate = (products - worker.before[1]) / (now - worker.before[0])
        worker.before = now, products
    state = "draining" if status.draining else "up"
    return WorkerState(worker.connection.name, state, "", latency, status, rate)


def transport_of(url: str) -> tuple[Transport, tuple[str, ...]]:
    """Find the transport that a URL names, with its options, and the endpoints.

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


def _remote_transports() -> list[str]:
    names = []
    for name, row in registry.installed(registry.TRANSPORTS).items():
        try:
            if row.load().remote:
                names.append(name)
        except PluginError:  # which its user is told when naming it
            names.append(name)
    return names
