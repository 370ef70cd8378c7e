"""The link of an HTTP client to one worker."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import httpx

from ciphertune.errors import KeyFileError, RefusedError, ReplyError, TransportError
from ciphertune.protocol import Frame, Limits, Message, error_message, pack, unpack
from ciphertune.transport import Link, PendingReplies
from ciphertune_http import body

_CONNECT_SECONDS = 5.0
_ROUNDS = 5
_CONNECTIONS = httpx.Limits(max_connections=128, max_keepalive_connections=16, keepalive_expiry=20)


class HttpLink(Link):
    """A POST for each request, on connections of a pool; an event loop on a thread of the link runs them.

    Args:
        url: scheme, host and port.
        token: sent with every request.
        ca: file with certificates to trust instead of the system's.
        direct: whether to ignore the environment's proxies.

    Raises:
        KeyFileError: the file of certificates cannot be used.
    """

    def __init__(self, url: str, token: str, ca: str | None, direct: bool) -> None:
        self.name = url
        # Of the worker TLS alone proves something: that the certificate is for this address.
        self.identity = f"tls {url}" if url.startswith("https:") else ""
        self._url = url + body.PATH
        try:
            verify = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise KeyFileError(f"{ca} cannot be used as certificates: {type(error).__name__}") from error
        self._http = httpx.AsyncClient(
            verify=verify,
            headers={"Authorization": f"Bearer {token}", "Content-Type": body.TYPE, "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=_CONNECTIONS,
            trust_env=not direct,
        )
        self._pending: PendingReplies[Message] = PendingReplies(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ciphertune-http", daemon=True)
        self._thread.start()

    def submit(self, request: Message) -> Future[Message]:
        """See ``Link.submit``. Buffers are read until the request has left, so they must not be changed."""
        frames = pack(request)
        number, reply = self._pending.add()
        self._call(self._start, number, frames, request.reply_limits, reply)
        return reply

    def close(self) -> None:
        """See ``Link.close``."""
        if not self._pending.close():
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()
        # Sockets close in the next rounds of the loop.
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        # After close the loop has ended, and all pending replies have failed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _start(self, number: int, frames: list[Frame], limits: Limits, reply: Future[Message]) -> None:
        if number in self._pending:
            task = self._loop.create_task(self._run(number, frames, limits))
            reply.add_done_callback(lambda _: self._call(task.cancel))

    async def _run(self, number: int, frames: list[Frame], limits: Limits) -> None:
        try:
            self._pending.answer(number, await self._exchange(frames, limits))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._pending.fail(number, f"{type(error).__name__}: {error}")
        except Exception as error:
            self._pending.fail(number, error)

    async def _exchange(self, frames: Sequence[Frame], limits: Limits) -> Message:
        async def content() -> AsyncIterator[bytes]:
            for chunk in body.chunks(frames):
                yield chunk

        size = {"Content-Length": str(body.length(frames))}
        async with self._http.stream("POST", self._url, content=content(), headers=size) as response:
            if response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
                return error_message("protocol", f"{self.name} takes no request of {size['Content-Length']} bytes")
            if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise RefusedError(f"{self.name} refused this client: its token is not among those authorised there")
            if response.status_code != httpx.codes.OK:
                raise TransportError(f"{self.name} answered with status {response.status_code}")
            if response.headers.get("Content-Type") != body.TYPE:
                raise TransportError(f"{self.name} is no CipherTune worker")
            most, announced = body.most_bytes(limits), response.headers.get("Content-Length", "0")
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > most or not announced.isdecimal() or int(announced[:18]) > most:
                    raise ReplyError(f"{self.name} sent more than the reply to its request can be")
        return unpack(body.split(received, limits), limits)
