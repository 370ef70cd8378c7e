"""Counters of a worker: sums over answered requests, and the load of a moment."""

from __future__ import annotations

import collections
import dataclasses

from ciphertune.protocol import Message


@dataclasses.dataclass
class Counters:
    """Sums over the requests of one client, or of all clients.

    Attributes:
        requests, errors: answers by kind of request, and error replies by code.
        bytes_in, bytes_out: of messages, headers included.
        queue_seconds, evaluate_seconds, pack_seconds: time requests waited, were evaluated, and were made into frames.
        joined: products that were evaluated together with another one.
        expired: sessions closed for idleness.
    """

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    queue_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    pack_seconds: float = 0.0
    joined: int = 0
    expired: int = 0

    @property
    def products(self) -> int:
        """Requests for products that were answered, with an error or not."""
        return self.requests["evaluate"]

    def count(self, kind: str, bytes_in: int, reply: Message, bytes_out: int, pack_seconds: float) -> None:
        """Count an answered request.

        Args:
            kind: of the request.
            bytes_in: of the request.
            reply: the answer.
            bytes_out: of the answer.
            pack_seconds: time that it took to make frames of the answer.
        """
        self.requests[kind] += 1
        if reply.kind == "error":
            self.errors[str(reply.fields["code"])] += 1
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out
        self.pack_seconds += pack_seconds


@dataclasses.dataclass(frozen=True)
class Load:
    """Load of a worker at one moment.

    Attributes:
        queued: requests that wait.
        under_way: requests not yet answered, and replies not yet taken.
        nbytes: their bytes.
        clients, sessions: known clients, and open sessions.
    """

    queued: int
    under_way: int
    nbytes: int
    clients: int
    sessions: int
