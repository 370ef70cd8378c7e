"""Addresses that stay: connections are passed on to wherever a worker runs now.

The front holds no key. Connections are encrypted from end to end, and a client knows its worker by the worker's key: a
front that passes it on to somebody else breaks the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from ciphertune_ray.address import actor_name

log = logging.getLogger(__name__)

_CHUNK = 1 << 18
_CONNECTIONS = 512
_LOCATE_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 1.0


class Front:
    """Listens at a port for each worker, and passes each connection on.

    Args:
        host: address to listen on.
        port: of worker 0; worker i has ``port + i``.
        locate: says where worker i listens now, as ``HOST:PORT``; raises ``LookupError`` where it does not.
    """

    def __init__(self, host: str, port: int, locate: Callable[[int], Awaitable[str]]) -> None:
        self._host, self._port, self._locate = host, port, locate
        self._servers: dict[int, asyncio.Server] = {}
        self._connections = 0

    async def listen(self, workers: Collection[int]) -> None:
        """Listen for these workers, and for others no more. A port that is in use is tried again at the next call."""
        for index in [index for index in self._servers if index not in workers]:
            self._servers.pop(index).close()
        for index in workers:
            if index not in self._servers:
                serve = functools.partial(self._serve, index)
                try:
                    self._servers[index] = await asyncio.start_server(serve, self._host, self._port + index)
                except OSError as error:
                    log.warning("cannot listen at %s:%d: %s", self._host, self._port + index, error.strerror or error)

    async def _serve(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _CONNECTIONS:
                # Whoever cannot be passed on is let go, and comes again.
                with contextlib.suppress(OSError, LookupError, asyncio.TimeoutError):
                    await self._pass_on(index, reader, writer)
        finally:
            self._connections -= 1
            writer.close()

    async def _pass_on(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = (await asyncio.wait_for(self._locate(index), _LOCATE_SECONDS)).rpartition(":")
        there = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), _CONNECT_SECONDS)
        try:
            ways = [asyncio.create_task(_copy(reader, there[1])), asyncio.create_task(_copy(there[0], writer))]
            # Where one end is gone, the other is let go at once, so that its client looks for the worker again.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            there[1].close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(_CHUNK):
            sink.write(data)
            await sink.drain()


class FrontActor:
    """A front in the cluster. After it has died Ray starts it again.

    Args:
        name: of the deployment whose workers it passes connections on to.
        port: of worker 0.
    """

    def __init__(self, name: str, port: int) -> None:
        self._name, self._port = name, port
        threading.Thread(target=lambda: asyncio.run(self._run()), name="ciphertune-front", daemon=True).start()

    async def describe(self) -> dict[str, Any]:
        """Describe where it listens, as plain data."""
        import ray

        return {"host": ray.util.get_node_ip_address(), "port": self._port}

    async def _run(self) -> None:
        from ciphertune_ray.deployment import members

        # Clients come from other machines; workers ask who they are.
        front = Front("0.0.0.0", self._port, self._locate)  # noqa: S104
        while True:
            try:
                await front.listen(await asyncio.to_thread(members, self._name))
            except Exception as error:
                # The cluster may be away for a while.
                log.warning("workers cannot be looked up: %s", type(error).__name__)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _locate(self, index: int) -> str:
        import ray

        from ciphertune_ray.deployment import NAMESPACE

        def ask() -> str:
            try:
                actor = ray.get_actor(actor_name(self._name, index), NAMESPACE)
                told = ray.get(actor.describe.remote(), timeout=_LOCATE_SECONDS)
            except (ValueError, ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                raise LookupError(f"worker {index} does not answer") from error
            if not told.get("address"):
                raise LookupError(f"worker {index} does not listen")
            return str(told["address"])

        return await asyncio.to_thread(ask)
