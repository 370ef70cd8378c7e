"""Bearer tokens: 256 random bits at the client, and their hash at the worker."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from pathlib import Path

from ciphertune.errors import KeyFileError
from ciphertune.key_files import refuse_shared, write_parts

log = logging.getLogger("ciphertune.http")

_LONGEST = 200


def make_token(token: Path, tokens: Path, name: str) -> None:
    """Write a new token, mode 0600, and append its name and hash to the worker's list.

    Raises:
        KeyFileError: the token's file exists, the name is not one word, or a file cannot be written.
    """
    if not name or len(name.split()) != 1 or not name.isprintable():
        raise KeyFileError(f"{name!r}: a client's name is one word")
    text = secrets.token_urlsafe(32)
    write_parts(token, [f"{text}\n".encode("ascii")])
    try:
        with os.fdopen(os.open(tokens, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(f"{name} {_digest(text)}\n")
    except OSError as error:
        raise KeyFileError(f"cannot write {error.filename}: {error.strerror}") from error


def read_token(path: str) -> str:
    """Read a client's token.

    Raises:
        KeyFileError: the file is missing, open to others, or holds no token.
    """
    try:
        refuse_shared(Path(path), Path(path).stat())
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} cannot be read as a token: {type(error).__name__}") from error
    if not 32 <= len(text) <= _LONGEST or not text.isprintable() or " " in text:
        raise KeyFileError(f"{path} holds no token; make one with python -m ciphertune_http")
    return text


class AuthorisedClients:
    """The clients that a worker serves, by the hashes of their tokens.

    Args:
        path: of the list, which is read again when it changes.

    Raises:
        KeyFileError: the list is missing, empty or malformed.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._status = self._look()
        self._names = self._read()

    def refresh(self) -> set[str]:
        """Read the list again if it has changed, and it is not damaged; return the clients that are on it no more."""
        status = self._look()
        if status is None or status == self._status:
            return set()
        self._status = status
        try:
            names = self._read()
        except KeyFileError as error:
            log.warning("the list of tokens stays as it was: %s", error)
            return set()
        gone = set(self._names.values()) - set(names.values())
        self._names = names
        return gone

    def _look(self) -> tuple[int, int] | None:
        try:
            status = Path(self._path).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def _read(self) -> dict[str, str]:
        path = self._path
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"{path} cannot be read as a list of tokens: {type(error).__name__}") from error
        names: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) != 64:
                raise KeyFileError(f"{path}, line {number}: expected a name and the SHA-256 of a token")
            names[words[1]] = words[0]
        if not names:
            raise KeyFileError(f"{path} lists no client")
        return names

    def name(self, header: bytes) -> str | None:
        """The name of the client with this ``Authorization`` header, or None.

        The lookup is by hash of 256 random bits, so that its time reveals nothing of a token.
        """
        kind, _, token = header.partition(b" ")
        if kind.lower() != b"bearer" or len(token) > _LONGEST:
            return None
        return self._names.get(_digest(token.strip().decode("latin-1")))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("latin-1")).hexdigest()
