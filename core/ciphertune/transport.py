"""What a transport is: one way to carry requests to workers and replies back."""

from __future__ import annotations

import abc
from concurrent.futures import Future
from typing import Any, ClassVar, Protocol

from ciphertune.protocol import Message


class Handler(Protocol):
    """What serves requests: a ``ciphertune.worker.Worker``, or anything with its ``handle``."""

    def handle(self, request: Message) -> Message:
        """Answer one request; never raises."""
        ...


class Link(abc.ABC):
    """An open connection to the workers behind one selection. Safe to use from several threads."""

    @abc.abstractmethod
    def submit(self, request: Message) -> Future[Message]:
        """Send a request; the future resolves to its reply.

        The future raises ``TransportError`` (``TransportTimeoutError`` past the deadline). A reply of kind ``error``
        is a result, not an exception: the session above turns it into one.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Drop the connection; pending futures fail with ``TransportError``. Idempotent."""


class Transport(abc.ABC):
    """A wire. Registered in ``ciphertune.transports``. Knows nothing of encryption or of what layers mean.

    Subclasses set ``name``, ``Options`` (a frozen dataclass) and ``remote``.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    remote: ClassVar[bool] = True
    """Whether requests leave this process; a backend that does not encrypt then needs ``allow_insecure=1``."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abc.abstractmethod
    def connect(self, endpoints: tuple[str, ...], worker: Handler | None) -> Link:
        """Open a link.

        Args:
            endpoints: addresses from the selection string.
            worker: the embedded worker for a transport that is not remote, else None.

        Raises:
            TransportError: no worker can be reached.
            SelectionError: the endpoints are not what this transport takes.
        """

    @abc.abstractmethod
    def serve(self, worker: Handler, address: str) -> None:
        """Serve ``worker`` at ``address`` until interrupted."""
