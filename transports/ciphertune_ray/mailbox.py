"""What stands in the cluster for a worker in a process that Ray did not start."""

from __future__ import annotations

from typing import Any

_MOST_WAITING = 64
"""Requests that a mailbox keeps; more wait where they come from."""


def mailbox_class() -> type:
    """The actor's class. Made in a function it travels as code, so that its process need not import torch."""
    import asyncio
    import itertools
    import os
    import socket

    most = _MOST_WAITING

    class Mailbox:
        """Keeps requests until they are taken, and each one's sender until it is answered."""

        def __init__(self) -> None:
            self._numbers = itertools.count(1)
            self._waiting: asyncio.Queue[list[Any]] = asyncio.Queue(most)
            self._answers: dict[int, asyncio.Future[list[Any]]] = {}

        async def answer(self, peer: str, *frames: Any) -> list[Any]:
            """Answer a request of the client known as ``peer``."""
            number = next(self._numbers)
            self._answers[number] = asyncio.get_running_loop().create_future()
            try:
                await self._waiting.put([number, peer, *frames])
                return await self._answers[number]
            finally:
                del self._answers[number]

        async def take(self) -> list[Any]:
            """The next request, when there is one: its number, peer and frames."""
            return await self._waiting.get()

        async def give(self, number: int, *frames: Any) -> None:
            """The answer to a request."""
            answer = self._answers.get(number)
            if answer is not None and not answer.done():
                answer.set_result(list(frames))

        async def describe(self) -> dict[str, Any]:
            """As ``WorkerActor.describe``; what the worker holds is not known here."""
            return {"host": socket.gethostname(), "pid": os.getpid(), "started": "by hand"}

    return Mailbox
