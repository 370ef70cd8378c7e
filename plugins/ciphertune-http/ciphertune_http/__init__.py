"""CipherTune over HTTPS: TLS, bearer tokens, one port, through proxies and load balancers.

``https`` is for workers anywhere; ``http`` has no TLS and is refused beyond this machine.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ciphertune.errors import SecurityError, SelectionError
from ciphertune.transport import Link, Listener, LocalWorker, Loopback, RequestHandler, Transport, opening_links

__version__ = "0.1.0"


@dataclasses.dataclass(frozen=True)
class HttpOptions:
    """Options of a client.

    Attributes:
        token: file with this client's bearer token, made by ``python -m ciphertune_http``.
        ca: file with the certificates of a private authority; those of the system if not given.
    """

    token: str | None = None
    ca: str | None = None


@dataclasses.dataclass(frozen=True)
class HttpServeOptions:
    """Options of a worker's side.

    Attributes:
        tokens: file with the names of clients and hashes of their tokens, a line each.
        certificate, key: files of the certificate chain and its private key (``https`` only).
        connections: open at the same time. At most 64 of them may be of peers that have shown no token for two seconds,
            and half of these from one address; the oldest are closed for newer ones.
    """

    tokens: str
    certificate: str | None = None
    key: str | None = None
    connections: int = 256


def read_address(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT``.

    Raises:
        SelectionError: the text has another form.
    """
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or any(c.isspace() for c in text) or parts.path or parts.username is not None:
        raise SelectionError(f"{text!r} is not HOST:PORT")
    return host, port


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HttpTransport(Transport):
    """HTTP without TLS, on this machine only: for tests, or behind a proxy on this machine that terminates TLS."""

    name = "http"
    interface = 1
    Options = HttpOptions
    ServeOptions = HttpServeOptions

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[Link]:
        """See ``Transport.connect``."""
        from ciphertune_http.client import HttpLink
        from ciphertune_http.tokens import read_token

        if not endpoints:
            raise SelectionError(f"the {self.name} transport needs the address of a worker: {self.name}://HOST:PORT")
        if self.options.token is None:
            raise SelectionError(f"the {self.name} transport needs the option token=FILE")
        token = read_token(self.options.token)
        hosts = [read_address(endpoint)[0] for endpoint in endpoints]
        for host in hosts:
            self._allow(host)
        with opening_links() as links:
            for endpoint, host in zip(endpoints, hosts, strict=True):
                links.append(HttpLink(f"{self.name}://{endpoint}", token, self.options.ca, direct=_is_loopback(host)))
        return links

    @classmethod
    def loopback(cls, folder: Path, options: Mapping[str, str]) -> Loopback:
        """See ``Transport.loopback``."""
        from ciphertune_http.tokens import make_token

        token, tokens = folder / "client.token", folder / "tokens.txt"
        if not token.exists():
            make_token(token, tokens, "client")
        return Loopback("127.0.0.1:0", serve={"tokens": str(tokens)}, connect={"token": str(token)})

    @classmethod
    def _allow(cls, host: str) -> None:
        if not _is_loopback(host):
            raise SecurityError(
                f"http://{host} would send this client's token in the clear; use https, or an address of this machine"
            )

    @classmethod
    def serve(cls, handler: RequestHandler, address: str, options: Any) -> Listener:
        """See ``Transport.serve``."""
        from ciphertune_http.server import HttpListener

        host, port = read_address(address)
        cls._allow(host)
        return HttpListener(handler, host, port, options)


class HttpsTransport(HttpTransport):
    """HTTPS, to workers anywhere."""

    name = "https"

    @classmethod
    def loopback(cls, folder: Path, options: Mapping[str, str]) -> Loopback:
        """See ``Transport.loopback``; the certificate is its own authority."""
        from ciphertune_http.certificates import self_signed

        plain = super().loopback(folder, options)
        pem = folder / "worker.pem"
        if not pem.exists():
            self_signed(pem, folder / "worker.crt", "127.0.0.1")
        return Loopback(
            plain.address,
            serve={**plain.serve, "certificate": str(pem), "key": str(pem)},
            connect={**plain.connect, "ca": str(folder / "worker.crt")},
        )

    @classmethod
    def _allow(cls, host: str) -> None:
        return

    @classmethod
    def serve(cls, handler: RequestHandler, address: str, options: Any) -> Listener:
        """See ``Transport.serve``."""
        if not options.certificate or not options.key:
            raise SelectionError("https needs certificate=FILE and key=FILE")
        return super().serve(handler, address, options)
