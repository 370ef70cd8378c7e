"""The embedded transport: the worker is in this process and buffers are handed over, not copied."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future

from ciphertune.errors import ProtocolError, ReplyError, SelectionError, TransportError
from ciphertune.protocol import Message, pack, unpack
from ciphertune.transport import Link, LocalWorker, Transport


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """Options of the local transport.

    Attributes:
        wire: put every message through its wire form, as a remote transport would; for tests.
    """

    wire: bool = False


class LocalLink(Link):
    """Calls the embedded worker on the caller's thread."""

    name = "the embedded worker"

    def __init__(self, worker: LocalWorker, wire: bool) -> None:
        self._worker: LocalWorker | None = worker
        self._wire = wire

    def submit(self, request: Message) -> Future[Message]:
        """Evaluate at once; the future is already done."""
        future: Future[Message] = Future()
        worker = self._worker  # another thread may close the link meanwhile
        if worker is None:
            future.set_exception(TransportError("the local link is closed"))
            return future
        try:
            reply = worker.handle(unpack(pack(request)) if self._wire else request)
            if self._wire:
                reply = self._carry(request, reply)
        except ProtocolError as error:
            future.set_exception(error)
        else:
            future.set_result(reply)
        return future

    def _carry(self, request: Message, reply: Message) -> Message:
        try:
            return unpack(pack(reply), request.reply_limits)
        except ProtocolError as error:
            raise ReplyError(f"{self.name} sent a malformed reply: {error}") from error

    def close(self) -> None:
        """See ``Link.close``."""
        self._worker = None


class LocalTransport(Transport):
    """The worker runs in this process; for one machine, for tests, and as the reference for other transports."""

    name = "local"
    interface = 1
    Options = LocalOptions
    remote = False

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[LocalLink]:
        """See ``Transport.connect``."""
        if endpoints:
            raise SelectionError(f"the local transport takes no endpoint, got {', '.join(endpoints)}")
        if worker is None:
            raise TransportError("the local transport needs an embedded worker")
        return [LocalLink(worker, self.options.wire)]
