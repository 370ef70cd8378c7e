"""A transport around another that is as bad as it is told to be: late, with losses, with connections that end."""

from __future__ import annotations

import dataclasses
import math

from ciphertune.errors import SelectionError
from ciphertune.transport import Link, WrappingTransport


@dataclasses.dataclass(frozen=True)
class FlakyOptions:
    """Options of the flaky transport. Without any it changes nothing.

    Attributes:
        latency: seconds by which every reply comes later.
        jitter: more seconds, from none to so many, drawn for each reply.
        loss: probability that a request is never answered: half of these never reach the worker, of the others the
            reply is lost.
        drops: probability that a request finds the connection lost, which fails whatever is under way on it.
        down: seconds that a lost connection stays lost.
        flaky_seed: a number that decides what is lost when, for each worker in the order of its requests; if not given,
            every session has other luck.
    """

    latency: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    drops: float = 0.0
    down: float = 0.0
    flaky_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("latency", "jitter", "down"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SelectionError(f"option {name}={getattr(self, name)} must be a number of seconds, 0 or more")
        for name in ("loss", "drops"):
            if not 0 <= getattr(self, name) <= 1:
                raise SelectionError(f"option {name}={getattr(self, name)} must be a probability, from 0 to 1")


class FlakyTransport(WrappingTransport):
    """Delays, loses and drops what another transport carries: ``mlwe+flaky::zmq://HOST:PORT?latency=0.1&loss=0.01``."""

    name = "flaky"
    Options = FlakyOptions

    def wrap(self, link: Link) -> Link:
        """See ``WrappingTransport.wrap``."""
        from ciphertune_flaky.link import FlakyLink

        return FlakyLink(link, self.options)
