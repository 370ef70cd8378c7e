"""Requests that come before the weights are there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ciphertune.protocol import Frame, Limits, Message, pack, unpack
from ciphertune.worker import Entrance


class Echo:
    limits = Limits()

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None]:
        return lambda: None

    def submit(
        self,
        frames: Sequence[Frame],
        peer: str,
        reply: Callable[..., None],
        connection: Hashable = None,
        *,
        idle: bool = False,
    ) -> None:
        reply(pack(Message("ok", {"peer": peer})), lambda: None)

    def left(self, peer: str, connection: Hashable) -> None:
        return

    def dismiss(self, peer: str) -> None:
        return

    def refused(self, peer: str, why: str) -> None:
        return


def test_clients_are_asked_to_try_again_until_it_opens() -> None:
    entrance, replies = Entrance(Limits()), []

    def answer() -> Message:
        entrance.submit(pack(Message("hello")), "me", lambda frames, release: replies.append(unpack(frames)))
        return replies[-1]

    assert (answer().kind, answer().fields["code"]) == ("error", "busy")
    entrance.open(Echo())
    assert answer().fields == {"peer": "me"}
