"""What a listener gives requests to from the moment that it listens, before the weights are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ciphertune.protocol import HELLO_VERSION, Frame, Limits, Message, error_message, pack
from ciphertune.transport import Reply, RequestHandler
from ciphertune.worker.refusals import Refusals


class Entrance:
    """Request handler that asks clients to try again until there is a service to hand requests to.

    So an address, a port or a key that cannot be used is found before weights are read, which may take minutes.

    Args:
        limits: what a message may be.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._refusals = Refusals()
        self._service: RequestHandler | None = None

    def open(self, service: RequestHandler) -> None:
        """Hand requests to a service from now on."""
        self._service = service

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None] | None:
        """Count a request; see ``ciphertune.transport.RequestHandler``."""
        return None if self._service is None else self._service.reserve(peer, nbytes)

    def submit(
        self, frames: Sequence[Frame], peer: str, reply: Reply, connection: Hashable = None, *, idle: bool = False
    ) -> None:
        """Take a request; see ``ciphertune.transport.RequestHandler``."""
        if self._service is not None:
            self._service.submit(frames, peer, reply, connection, idle=idle)
            return
        refusal = error_message("busy", "the worker is still reading its weights")
        # Of the version that every client reads, whatever it sent.
        reply(pack(Message(refusal.kind, refusal.fields, version=HELLO_VERSION)), lambda: None)

    def left(self, peer: str, connection: Hashable) -> None:
        """Take notice of a connection that has ended; see ``ciphertune.transport.RequestHandler``."""
        if self._service is not None:
            self._service.left(peer, connection)

    def dismiss(self, peer: str) -> None:
        """End a client's sessions; see ``ciphertune.transport.RequestHandler``."""
        if self._service is not None:
            self._service.dismiss(peer)

    def refused(self, peer: str, why: str) -> None:
        """Count a refusal; see ``ciphertune.transport.RequestHandler``."""
        if self._service is not None:
            self._service.refused(peer, why)
        else:
            self._refusals.note(peer, why)
