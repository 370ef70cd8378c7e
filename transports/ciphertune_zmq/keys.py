"""CURVE key pairs (Curve25519, as in ZeroMQ's RFC 26) and their files.

``worker.key`` and ``client.key`` are secret; ``worker.pub`` goes to clients, ``clients/*.pub`` stay at the worker.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ciphertune.errors import KeyFileError
from ciphertune.key_files import read_key_file, write_key_file

_SECRET_FORM = "ciphertune-curve-secret-1"  # noqa: S105 - the name of a format
_PUBLIC_FORM = "ciphertune-curve-public-1"
_Z85 = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")


@dataclasses.dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, each 40 characters of Z85."""

    public: bytes
    secret: bytes = dataclasses.field(repr=False)


def make_pair(secret_file: Path, public_file: Path) -> None:
    """Make a key pair from the operating system's randomness; existing files are never overwritten.

    Raises:
        KeyFileError: a file exists or cannot be written.
    """
    import zmq

    public, secret = zmq.curve_keypair()
    if public_file.exists():
        raise KeyFileError(f"{public_file} exists already; a key file is never overwritten")
    write_key_file(
        secret_file, {"format": _SECRET_FORM, "public": public.decode("ascii"), "secret": secret.decode("ascii")}
    )
    try:
        write_key_file(public_file, {"format": _PUBLIC_FORM, "public": public.decode("ascii")}, secret=False)
    except BaseException:
        secret_file.unlink()  # worth nothing alone, and in the way of the next attempt
        raise


def read_pair(file: Path) -> KeyPair:
    """Read a secret key file. Raises ``KeyFileError``."""
    import zmq

    content = read_key_file(file, _SECRET_FORM)
    pair = KeyPair(_key(content.get("public"), file), _key(content.get("secret"), file))
    if zmq.curve_public(pair.secret) != pair.public:
        raise KeyFileError(f"{file} is damaged: its two halves do not belong together")
    return pair


def read_public(file: Path) -> bytes:
    """Read a public key file. Raises ``KeyFileError``."""
    return _key(read_key_file(file, _PUBLIC_FORM, secret=False).get("public"), file)


def _key(text: object, file: Path) -> bytes:
    key = text.encode() if isinstance(text, str) else b""
    if len(key) != 40 or not _Z85.issuperset(key):
        raise KeyFileError(f"{file} is damaged or not a key file")
    return key
