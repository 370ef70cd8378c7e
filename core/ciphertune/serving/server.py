"""The server: a model, a thread that computes answers, and uvicorn in front."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import threading
from typing import Any

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError, TransportError
from ciphertune.serving.decoding import Decoder
from ciphertune.serving.engine import Engine
from ciphertune.serving.keys import Callers
from ciphertune.serving.served import ServedModel
from ciphertune.serving.settings import ServeSettings

_GRACE_SECONDS = 5
_INSTALL = 'pip install "ciphertune[serve]"'


def refuse_missing() -> None:
    """Raise ``ConfigError`` where starlette or uvicorn is missing, with what to install."""
    for module in ("starlette", "uvicorn"):
        import_optional(module, _INSTALL)


class Server:
    """Answers requests for one model by the chat-completions protocol, once it is started.

    The session is not closed with the server: it belongs to whoever outsourced the model.

    Args:
        name: by which requests ask for the model.
        model: a causal language model of transformers, outsourced or not, with or without an adapter.
        tokenizer: of transformers.
        settings: address, keys and limits.

    Attributes:
        address: URL that it listens at.

    Raises:
        ConfigError: starlette or uvicorn is missing; the tokenizer does not fit; the certificate cannot be used.
        SecurityError: several keys are given, and the model's backend cannot keep callers apart.
        TransportError: the address cannot be used.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, settings: ServeSettings) -> None:
        refuse_missing()
        import uvicorn

        from ciphertune.serving.app import Application

        _check_certificate(settings)
        served = ServedModel(name, model, tokenizer)
        callers = Callers(settings.api_keys, settings.host)
        apart = callers.count > 1 and _keep_apart(model)
        model.eval()
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            self._socket = socket.create_server((settings.host, settings.port), family=family, backlog=128)
        except OSError as error:
            raise TransportError(f"cannot listen at {settings.host}:{settings.port}: {error}") from error
        # Without it small pieces are delayed. Connections inherit it; asyncio sets it only on sockets made as TCP's.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            decoder = Decoder(model, served.filler, settings.pad_tokens, apart=apart)
        except BaseException:
            self._socket.close()
            raise
        self._engine = Engine(decoder, settings.max_batch, settings.max_waiting)
        config = uvicorn.Config(
            Application(served, self._engine, callers, settings).asgi(),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.certificate_key,
        )
        self._uvicorn = uvicorn.Server(config)
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        scheme = "http" if settings.certificate is None else "https"
        self.address = f"{scheme}://{shown}:{self._socket.getsockname()[1]}"
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGTERM, which lets answers under way end for five seconds, or until Ctrl-C."""
        asked = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
        try:
            self.start()
            # With a time, so that Ctrl-C is noticed on every system.
            while not asked.wait(1.0):
                pass
            self._uvicorn.should_exit = True
            assert self._thread is not None
            self._thread.join()
        finally:
            self.close()
            signal.signal(signal.SIGTERM, before)

    def start(self) -> None:
        """Serve on a thread of its own, until ``close``."""
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._uvicorn.serve([self._socket])), name="ciphertune-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End. Idempotent."""
        self._engine.close()
        self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()


def _check_certificate(settings: ServeSettings) -> None:
    if settings.certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.certificate, settings.certificate_key)
    except OSError as error:  # ssl's own errors are some too
        raise ConfigError(f"{settings.certificate} and {settings.certificate_key} cannot be used: {error}") from error


def _keep_apart(model: Any) -> bool:
    """Whether callers have to be kept apart: where the model has sessions, which then do so."""
    from ciphertune.outsourcing.convert import sessions_of

    sessions = sessions_of(model)
    for session in sessions:
        session.keep_apart()
    return bool(sessions)
