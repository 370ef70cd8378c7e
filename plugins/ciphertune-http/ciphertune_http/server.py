"""The listener of an HTTP worker: an ASGI application that uvicorn serves on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import uvicorn

from ciphertune.errors import KeyFileError, ProtocolError, TransportError
from ciphertune.protocol import Frame, error_message, pack
from ciphertune.transport import Connections, Listener, RequestHandler, connections_allowed
from ciphertune_http import HttpServeOptions, body
from ciphertune_http.tokens import AuthorisedClients

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_Answer = tuple[list[Frame], Callable[[], None]]

_HEAD_SECONDS = 10.0
"""Time for a connection's handshake and the headers of a request, and between two requests."""
_BODY_SECONDS = 30.0
"""Time for a request's body, beside that for its bytes at the slowest rate."""
_SLOWEST_RATE = 1 << 16
"""Bytes a second that a body has to come at, on the whole."""
_SWEEP_SECONDS = 0.5
_CLOSE_SECONDS = 1.0
_ROUNDS = 5
# Of all connections of all listeners of this process.
_numbers = itertools.count(1)


class _Door(socket.socket):
    """A listening socket that keeps count of the connections made over it, from before TLS.

    All calls but the first are of the event loop's thread.
    """

    def guard(self, connections: Connections[_Peer], ended: Callable[[_Peer], None]) -> None:
        """Begin to count, and tell of connections that have ended."""
        self._connections = connections
        self._ended = ended
        self._sockets: weakref.WeakValueDictionary[_Peer, socket.socket] = weakref.WeakValueDictionary()

    def accept(self) -> tuple[socket.socket, Any]:
        """See ``socket.socket.accept``."""
        connection, address = super().accept()
        peer = _Peer(address[0], address[1])
        self._sockets[peer] = connection
        self._connections.came(peer, peer.host)
        self.sweep()
        return connection, address

    def sweep(self) -> None:
        """Forget connections that have ended, and end those that are too many or too slow."""
        for peer in self._connections.all():
            known = self._sockets.get(peer)
            if known is None or known.fileno() < 0:
                self._connections.gone(peer)
                self._ended(peer)
        for peer in self._connections.excess():
            self._ended(peer)
            if (victim := self._sockets.pop(peer, None)) is not None:
                with contextlib.suppress(OSError):
                    victim.shutdown(socket.SHUT_RDWR)


class _Peer(NamedTuple):
    """The other end of a connection."""

    host: str
    port: int


class _Application:
    """Checks a request's path, token and length, reads its body, and hands it to the handler."""

    def __init__(self, handler: RequestHandler, authorised: AuthorisedClients, connections: Connections[_Peer]) -> None:
        self._connections = connections
        self._handler = handler
        self._authorised = authorised
        self._most = body.most_bytes(handler.limits)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: dict[_Peer, tuple[str, int]] = {}  # clients of connections, and the connections' numbers
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

    def ended(self, connection: _Peer) -> None:
        """Tell the handler of a connection that has ended."""
        if (known := self._known.pop(connection, None)) is not None:
            self._handler.left(*known)

    def revoke(self) -> None:
        """End the sessions of clients whose tokens were taken out; without one they are refused."""
        for client in self._authorised.refresh():
            self._handler.dismiss(client)

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
            self._handler.refused(scope["client"][0], "its token is not authorised")
            return await _status(send, 401)
        connection = _Peer(*scope["client"])
        self._connections.known(connection)
        try:
            client, number = self._known.get(connection, (peer, 0))
            if not number or client != peer:
                self.ended(connection)
                number = next(_numbers)
                self._known[connection] = peer, number
            return await self._serve_client(peer, number, headers, receive, send)
        finally:
            self._connections.stranger_again(connection)

    async def _serve_client(
        self, peer: str, connection: int, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        if self.closing:
            return await _status(send, 503)
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return await _status(send, 411)
        if len(length) > 18 or int(length) > self._most:
            return await _status(send, 413)
        give_back = self._handler.reserve(peer, int(length))
        if give_back is None:
            refusal = error_message("busy", "this worker has no room for another request of this client now")
            return await self._send(send, pack(refusal))
        try:
            received = await self._read(receive, int(length))
        finally:
            give_back()
        if received is None:
            return await _status(send, 408)
        try:
            frames = body.split(received, self._handler.limits)
        except ProtocolError as error:
            self._handler.refused(peer, f"a malformed request: {error}")
            frames = []
        del received
        answer = await self._answer(frames, peer, connection)
        if answer is None:
            return await _status(send, 503)
        del frames
        reply, release = answer
        try:
            return await self._send(send, reply)
        finally:
            release()

    @staticmethod
    async def _send(send: Send, reply: Sequence[Frame]) -> None:
        await _start(send, 200, body.length(reply), body.TYPE)
        for chunk in body.chunks(reply):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _read(self, receive: Receive, length: int) -> bytearray | None:
        """Read the body; None if the client is gone or too slow. The server enforces the announced length."""
        received = bytearray()
        end = time.monotonic() + _BODY_SECONDS + length / _SLOWEST_RATE
        while True:
            try:
                event = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                return None
            if event["type"] != "http.request":
                return None
            received += event.get("body", b"")
            if not event.get("more_body", False):
                return received

    async def _answer(self, frames: list[Frame], peer: str, connection: int) -> _Answer | None:
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
            self._handler.submit(frames, peer, from_any_thread, connection)
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
        connections: Connections[_Peer] = Connections(connections_allowed(options.connections), _HEAD_SECONDS)
        self._application = _Application(handler, AuthorisedClients(options.tokens), connections)
        config = uvicorn.Config(
            self._application,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
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
            server = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise TransportError(f"cannot listen at {host}:{port}: {error}") from error
        self._socket = _Door(server.family, server.type, server.proto, server.detach())
        self._socket.guard(connections, self._application.ended)
        # Without it small replies are delayed. Connections inherit it; asyncio sets it only on sockets made as TCP's.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="ciphertune-http-serve", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        async def serve() -> None:
            sweeping = asyncio.create_task(self._sweep())
            await self._server.serve([self._socket])
            sweeping.cancel()
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

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._socket.sweep()
            self._application.revoke()

    def close(self, linger: float = 0.0) -> None:
        """See ``Listener.close``."""
        end = time.monotonic() + linger
        while self._application.busy and time.monotonic() < end:
            time.sleep(0.01)
        self._application.end()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
