"""The present address of a worker that moves: a line in a file, or of what a URL gives."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from ciphertune.errors import SelectionError, TransportError
from ciphertune_zmq.address import Address, parse

_MOST_BYTES = 300
_SECONDS = 5.0


def read(where: Address) -> Address:
    """Read the address that stands at a place.

    Args:
        where: of scheme ``file``, ``http`` or ``https``.

    Raises:
        TransportError: nothing can be read there, or it is not one line with ``HOST:PORT``.
    """
    try:
        if where.scheme == "file":
            with Path(where.path).open("rb") as stream:
                found = stream.read(_MOST_BYTES + 1)
        else:
            # ``where`` has one of these two schemes.
            with urllib.request.urlopen(str(where), timeout=_SECONDS) as stream:  # noqa: S310
                found = stream.read(_MOST_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the answer, too
        raise TransportError(f"its address cannot be read from {where}: {error}") from error
    try:
        address = parse(found.decode("ascii").strip())
    except (SelectionError, UnicodeDecodeError):
        address = where
    # A place says where a worker is, and no more: neither which file to open, nor where else to ask.
    if len(found) > _MOST_BYTES or address.scheme != "tcp" or address.port == "*":
        raise TransportError(f"what {where} holds is no address: one line with HOST:PORT is expected")
    return address


class Lookup:
    """Reads an address on a thread of its own, since a file or a server may take long to answer.

    Args:
        where: what ``read`` takes.
        found: called on that thread, once there is something to ``take``.
    """

    def __init__(self, where: Address, found: Callable[[], None]) -> None:
        self.where = where
        self._found = found
        self._lock = threading.Lock()
        self._asking = False
        self._answer: Address | TransportError | None = None

    def ask(self) -> None:
        """Begin to read, unless that goes on already."""
        with self._lock:
            if self._asking:
                return
            self._asking = True
        threading.Thread(target=self._read, name=f"ciphertune-zmq-lookup-{self.where}", daemon=True).start()

    def take(self) -> Address | TransportError | None:
        """What was read since the last call, or why it could not be; None where nothing was."""
        with self._lock:
            answer, self._answer = self._answer, None
        return answer

    def _read(self) -> None:
        answer: Address | TransportError
        try:
            answer = read(self.where)
        except TransportError as error:
            answer = error
        with self._lock:
            self._answer, self._asking = answer, False
        self._found()
