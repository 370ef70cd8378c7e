"""Times that a client waits for workers."""

from __future__ import annotations

import dataclasses
import math

from ciphertune.errors import SelectionError


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Times to wait for workers.

    Attributes:
        timeout: seconds without an answer after which a request is sent again, to a replica where there is one.
        deadline: seconds that one product may take in all, restarts of workers included.
        hedge: seconds after which an unanswered request is also sent to a replica; 0 for never.
        connect_timeout: seconds to wait for the workers when a session opens.

    Raises:
        SelectionError: one of them is no number of seconds above 0.
    """

    timeout: float = 60.0
    deadline: float = 300.0
    hedge: float = 0.0
    connect_timeout: float = 20.0

    def __post_init__(self) -> None:
        for name, least in (("timeout", 0.001), ("deadline", 0.001), ("hedge", 0.0), ("connect_timeout", 0.001)):
            if not least <= getattr(self, name) < math.inf:
                raise SelectionError(f"option {name}={getattr(self, name)} must be a number of seconds above 0")

    def extended(self, seconds: float) -> Timeouts:
        """Timeouts for a product that may take so much longer."""
        return Timeouts(
            self.timeout + seconds,
            self.deadline + seconds,
            self.hedge + seconds if self.hedge else 0.0,
            self.connect_timeout,
        )
