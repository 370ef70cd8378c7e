"""The listener of an HTTP worker: an ASGI application that uvicorn serves on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

from ciphertune.errors import KeyFileError, ProtocolError, TransportError
from ciphertune.protocol import Frame
from ciphertune.transport import Listener, RequestHandler
from ciphertune_http import HttpServeOptions, body
from ciphertune_http.tokens import AuthorisedClients

log = logging.getLogger("ciphertune.http")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_Answer = tuple[list[Frame], Callable[[], None]]

_BODY_SECONDS = 60.0
"""Longest silence in the middle of a request's body."""
_CLOSE_SECONDS = 1.0
_ROUNDS = 5


class _Application:
    """Checks a request's path, token and length, reads its body, and hands it to the handler."""

    def __init__(self, handler: RequestHandler, authorised: AuthorisedClients) -> None:
        self._handler = handler
        self._authorised = authorised
        self._most = body.most_bytes(handler.limits)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.waiting: set[asyncio.Future[_Answer | None]] = set()
        self.busy = 0
        self.closing = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        if scope["type"] != "http":
            return
        self.busy += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self.busy -= 1

    def end(self) -> None:
        """Refuse new requests and those that wait for a reply; callable from any thread."""
        self.closing = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._refuse_waiting)

    def _refuse_waiting(self) -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(None)

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["path"] != body.PATH:
            return await _status(send, 404)
        if scope["method"] != "POST":
            return await _status(send, 405)
        peer = self._authorised.name(headers.get(b"authorization", b""))
        if peer is None:
            return await _status(send, 401)
        if self.closing:
            return await _status(send, 503)
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return await _status(send, 411)
        if len(length) > 18 or int(length) > self._most:
            return await _status(send, 413)
        received = await self._read(receive)
        if received is None:
            return None
        try:
            frames = body.split(received, self._handler.limits)
        except ProtocolError as error:
            log.info("malformed request of %s: %s", peer, error)
            frames = []
        answer = await self._answer(frames, peer)
        if answer is None:
            return await _status(send, 503)
        reply, release = answer
        try:
            await _start(send, 200, body.length(reply), body.TYPE)
            for chunk in body.chunks(reply):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            release()
        return None

    async def _read(self, receive: Receive) -> bytearray | None:
        """Read the body; None if the client is gone or silent. The server enforces the announced length."""
        received = bytearray()
        while True:
            try:
                event = await asyncio.wait_for(receive(), _BODY_SECONDS)
            except asyncio.TimeoutError:
                return None
            if event["type"] != "http.request":
                return None
            received += event.get("body", b"")
            if not event.get("more_body", False):
                return received

    async def _answer(self, frames: list[Frame], peer: str) -> _Answer | None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Answer | None] = loop.create_future()

        def deliver(reply: list[Frame], release: Callable[[], None]) -> None:
            if future.done():
                release()
            else:
                future.set_result((reply, release))

        def from_any_thread(reply: list[Frame], release: Callable[[], None]) -> None:
            try:
                loop.call_soon_threadsafe(deliver, reply, release)
            except RuntimeError:
                # The loop has ended, so the reply cannot be sent.
                release()

        self.waiting.add(future)
        try:
            self._handler.submit(frames, peer, from_any_thread)
            return await future
        finally:
            self.waiting.discard(future)


async def _start(send: Send, status: int, length: int, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _status(send: Send, status: int) -> None:
    await _start(send, status, 0, "text/plain")
    await send({"type": "http.response.body", "body": b""})


class HttpListener(Listener):
    """Serves a handler until it is closed.

    Raises:
        KeyFileError: tokens or certificates cannot be used.
        TransportError: the address cannot be used.
    """

    def __init__(self, handler: RequestHandler, host: str, port: int, options: HttpServeOptions) -> None:
        self._application = _Application(handler, AuthorisedClients(options.tokens))
        config = uvicorn.Config(
            self._application,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=options.connections,
            timeout_graceful_shutdown=1,
            ssl_certfile=options.certificate,
            ssl_keyfile=options.key,
        )
        try:
            config.load()
        except OSError as error:
            raise KeyFileError(f"{options.certificate} and {options.key} cannot be used: {error}") from error
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise TransportError(f"cannot listen at {host}:{port}: {error}") from error
        # Without it small replies are delayed. Connections inherit it; asyncio sets it only on sockets made as TCP's.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="ciphertune-http-serve", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        async def serve() -> None:
            await self._server.serve([self._socket])
            # TLS waits for the peer's close_notify; a peer that does not send one is disconnected.
            connections = self._server.server_state.connections
            end = time.monotonic() + _CLOSE_SECONDS
            while connections and time.monotonic() < end:
                await asyncio.sleep(0.01)
            for connection in list(connections):
                connection.transport.abort()
            # Connections close in the next rounds of the loop.
            for _ in range(_ROUNDS):
                await asyncio.sleep(0.01)

        asyncio.run(serve())

    def close(self, linger: float = 0.0) -> None:
        """See ``Listener.close``."""
        end = time.monotonic() + linger
        while self._application.busy and time.monotonic() < end:
            time.sleep(0.01)
        self._application.end()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
