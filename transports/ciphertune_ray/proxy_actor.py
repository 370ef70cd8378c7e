"""An actor that takes requests for a worker in a process that Ray did not start."""

from __future__ import annotations

from typing import Any

_QUEUE_LENGTH = 64
"""Requests in the queue of a proxy; more wait at their senders."""


def worker_proxy_class() -> type:
    """Make the actor's class. Ray sends a class made in a function as code, so its process need not import torch."""
    import asyncio
    import itertools
    import os
    import socket

    length = _QUEUE_LENGTH

    class WorkerProxy:
        """Queues requests for the worker, and gives each sender the reply when it comes."""

        def __init__(self) -> None:
            self._numbers = itertools.count(1)
            self._queue: asyncio.Queue[list[Any]] = asyncio.Queue(length)
            self._replies: dict[int, asyncio.Future[list[Any]]] = {}

        async def answer(self, peer: str, *frames: Any) -> list[Any]:
            """Answer a request of the client known as ``peer``."""
            number = next(self._numbers)
            self._replies[number] = asyncio.get_running_loop().create_future()
            try:
                await self._queue.put([number, peer, *frames])
                return await self._replies[number]
            finally:
                del self._replies[number]

        async def next_request(self) -> list[Any]:
            """Wait for the next request: its number, its peer, and its frames."""
            return await self._queue.get()

        async def reply(self, number: int, *frames: Any) -> None:
            """Answer the request of this number; ignored if nobody waits for it any more."""
            reply = self._replies.get(number)
            if reply is not None and not reply.done():
                reply.set_result(list(frames))

        async def describe(self) -> dict[str, Any]:
            """Describe it as ``WorkerActor.describe`` does, without the worker's layers, which are not known here."""
            return {"host": socket.gethostname(), "pid": os.getpid(), "started": "by hand"}

    return WorkerProxy
