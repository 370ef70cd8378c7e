"""What a listener gives requests to from the moment that it listens, before the weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ciphertune.protocol import HELLO_VERSION, Frame, Limits, Message, error_message, pack
from ciphertune.transport import Reply, RequestHandler


class Entrance:
    """Request handler that asks clients to try again until there is a service to hand requests to.

    So an address, a port or a key that cannot be used is found before weights are read, which may take minutes.

    Args:
        limits: what a message may be.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._service: RequestHandler | None = None

    def open(self, service: RequestHandler) -> None:
        """Hand requests to a service from now on."""
        self._service = service

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None] | None:
        """Count a request; see ``ciphertune.transport.RequestHandler``."""
        return None if self._service is None else self._service.reserve(peer, nbytes)

    def submit(self, frames: Sequence[Frame], peer: str, reply: Reply) -> None:
        """Take a request; see ``ciphertune.transport.RequestHandler``."""
        if self._service is not None:
            self._service.submit(frames, peer, reply)
            return
        refusal = error_message("busy", "the worker is still reading its weights")
        # Of the version that every client reads, whatever it sent.
        reply(pack(Message(refusal.kind, refusal.fields, version=HELLO_VERSION)), lambda: None)
