"""Addresses of workers, as users write them."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import sys

from ciphertune.errors import SelectionError

# What the system's structure for addresses holds, less the zero at the end.
_LONGEST_PATH = 107 if sys.platform == "linux" else 103
PLACES = ("file", "http", "https")
"""Schemes of a place where a worker's present address is written."""


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of a worker.

    Attributes:
        scheme: ``tcp`` or ``ipc``, or one of ``PLACES``.
        host, port: of a TCP address; the port may be ``*`` for any free one.
        path: of a Unix socket, or of a place: for a URL with the host.
    """

    scheme: str
    host: str = ""
    port: str = ""
    path: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.scheme == "tcp" else f"{self.scheme}://{self.path}"

    @property
    def zmq(self) -> str:
        """The address in ZeroMQ's form."""
        return f"ipc://{self.path}" if self.scheme == "ipc" else f"tcp://{self.host}:{self.port}"

    @property
    def moves(self) -> bool:
        """Whether this is a place where the worker's address is written, and not that address."""
        return self.scheme in PLACES

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.scheme == "ipc" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse(text: str) -> Address:
    """Read ``HOST:PORT``, ``tcp://HOST:PORT``, ``ipc://PATH``, or ``file://PATH`` or a URL with the address in it.

    >>> parse("10.0.0.5:5555")
    Address(scheme='tcp', host='10.0.0.5', port='5555', path='')
    >>> str(parse("ipc:///run/worker.sock")), parse("tcp://[::1]:5555").loopback
    ('ipc:///run/worker.sock', True)

    Raises:
        SelectionError: the text has another form.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "tcp", text
    if scheme == "ipc" and rest:
        if (size := len(os.fsencode(rest))) > _LONGEST_PATH:
            raise SelectionError(f"{text!r} is too long: a Unix socket's path takes {_LONGEST_PATH} bytes, not {size}")
        return Address("ipc", path=rest)
    if scheme in PLACES and (rest.startswith("/") if scheme == "file" else rest.partition("/")[2]):
        return Address(scheme, path=rest)
    host, colon, port = rest.rpartition(":")
    if scheme == "tcp" and colon and host and (port == "*" or (port.isdecimal() and int(port) < 65536)):
        return Address("tcp", host=host, port="*" if port == "0" else port)
    raise SelectionError(
        f"cannot read the address {text!r}: expected HOST:PORT, tcp://HOST:PORT, ipc://PATH, or where a worker's "
        "address is written: file:///PATH, https://HOST/PATH"
    )
