"""Replies of a service to one client."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ciphertune.protocol import Frame, Message, unpack


class Inbox:
    """Replies to one client, in the order in which they came."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.releases: list[Callable[[], None]] = []
        self.keep = False
        self._arrived = threading.Condition()

    def take(self, frames: list[Frame], release: Callable[[], None]) -> None:
        with self._arrived:
            self.messages.append(unpack(frames))
            self.releases.append(release)
            if not self.keep:
                release()
            self._arrived.notify_all()

    def wait(self, count: int) -> list[Message]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.messages) >= count, 60), self.messages
            return self.messages
