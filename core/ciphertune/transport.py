"""What a transport is: one way to carry requests to workers and replies back."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ciphertune._support.options import build_options
from ciphertune.errors import SelectionError
from ciphertune.protocol import Frame, Limits, Message


class LocalWorker(Protocol):
    """What answers requests: a ``ciphertune.worker.worker.Worker``, or anything with its ``handle``."""

    def handle(self, request: Message, peer: str = ...) -> Message:
        """Answer one request of the client known as ``peer``; never raises."""
        ...


Reply = Callable[[list[Frame], Callable[[], None]], None]
"""Takes a reply's frames and what to call once they have left this process, or never will."""


class RequestHandler(Protocol):
    """What a listener hands requests to: a ``ciphertune.worker.service.Service``."""

    limits: Limits
    """What a listener need not take from a peer."""

    def submit(self, frames: Sequence[Frame], peer: str, reply: Reply) -> None:
        """Take a request; ``reply`` is called once, from any thread. Never raises and never blocks for long.

        A request that the listener could not put together is handed over without frames: its sender is owed an error.
        """
        ...


def settle(future: Future[Any], outcome: Any) -> None:
    """Give a future its result, or the exception that it fails with; one that was given up is left alone."""
    # Whoever waited may give up at this very moment.
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class Link(abc.ABC):
    """An open connection to one worker. Safe to use from several threads.

    Attributes:
        name: where the worker is, for messages.
    """

    name: str = ""

    @abc.abstractmethod
    def submit(self, request: Message) -> Future[Message]:
        """Send a request; the future resolves to its reply.

        The future raises ``TransportError`` as soon as it is known that no reply will come over this connection: the
        worker is gone, or was never there. It has no deadline of its own: whoever waits sets one, and cancels the
        future to forget the request. A reply of kind ``error`` is a result, not an exception. After a failure the
        link connects again by itself, and later requests may succeed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Drop the connection; pending futures fail with ``TransportError``. Idempotent."""


class Listener(abc.ABC):
    """A worker's open door.

    Attributes:
        address: what clients write after ``://``.
    """

    address: str = ""

    @abc.abstractmethod
    def close(self, linger: float = 0.0) -> None:
        """Stop taking requests, give replies that are ready up to ``linger`` seconds to leave, and let go.

        Idempotent.
        """


@dataclasses.dataclass(frozen=True)
class Loopback:
    """How a worker is tried out on this machine.

    Attributes:
        address: for ``listen``: on this machine only, on any free port.
        serve: options of ``listen``.
        connect: options of a client's selection string.
    """

    address: str
    serve: Mapping[str, str] = dataclasses.field(default_factory=dict)
    connect: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Transport(abc.ABC):
    """A wire. Registered in ``ciphertune.transports``. Knows nothing of encryption or of what layers mean.

    Subclasses set ``name``, ``Options`` (a frozen dataclass), ``remote`` and, where they can serve, ``ServeOptions``.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    ServeOptions: ClassVar[type | None] = None
    """Options of ``listen``, a frozen dataclass; None where workers cannot be served over this transport."""
    remote: ClassVar[bool] = True
    """Whether requests leave this process; a backend that does not encrypt then needs ``allow_insecure=1``."""
    elastic: ClassVar[bool] = False
    """Whether workers may join while a session is open: ``joining_workers`` is then asked repeatedly."""
    joining_seconds: ClassVar[float] = 2.0
    """Seconds between two calls of ``joining_workers``."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abc.abstractmethod
    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> Sequence[Link]:
        """Open a link to every worker, without waiting for any of them.

        Args:
            endpoints: addresses from the selection string.
            worker: the embedded worker for a transport that is not remote, else None.

        Raises:
            SelectionError: the endpoints are not what this transport takes.
            KeyFileError, SecurityError: the link cannot be made as safe as asked for.
        """

    def joining_workers(self, endpoints: tuple[str, ...], links: Sequence[Link]) -> Sequence[Link]:
        """Links to the workers that have come since, opened as ``connect`` does. May wait for an answer.

        Args:
            endpoints: as for ``connect``.
            links: those that are open; a worker with the name of one of them has not joined.

        Raises:
            TransportError: it cannot be said now; the question is asked again later.
        """
        return ()

    @classmethod
    def listen(cls, handler: RequestHandler, address: str, options: Mapping[str, Any]) -> Listener:
        """Serve at an address, on threads of the transport's own.

        Args:
            handler: where requests go.
            address: in this transport's form.
            options: text or values for ``ServeOptions``.

        Raises:
            SelectionError: this transport cannot serve, or the address or an option is wrong.
            KeyFileError, SecurityError: it cannot be served as safely as asked for.
            TransportError: the address cannot be used.
        """
        if cls.ServeOptions is None:
            raise SelectionError(f"the {cls.name} transport cannot serve workers")
        return cls._listen(handler, address, build_options(cls.ServeOptions, options))

    @classmethod
    def loopback(cls, folder: Path, options: Mapping[str, str]) -> Loopback:
        """How to serve a worker on this machine for a moment: for benchmarks, the demo and the conformance suite.

        Args:
            folder: keys and certificates may be made there.
            options: those that the client's selection string has already, which go before ``connect``.

        Raises:
            SelectionError: this transport cannot serve.
        """
        if cls.ServeOptions is None:
            raise SelectionError(f"the {cls.name} transport cannot serve workers, so it needs the address of one")
        return Loopback("127.0.0.1:0")

    @classmethod
    def _listen(cls, handler: RequestHandler, address: str, options: Any) -> Listener:
        raise NotImplementedError
