"""The protection of a connection: CURVE keys, a Unix socket's permissions, or, if the user insists, none."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ciphertune.errors import KeyFileError, SecurityError
from ciphertune.key_files import keys_folder
from ciphertune_zmq.address import Address
from ciphertune_zmq.keys import KeyPair, read_pair, read_public

if TYPE_CHECKING:
    from ciphertune_zmq import ZmqOptions, ZmqServeOptions

log = logging.getLogger(__name__)

CURVE_PEER = "User-Id"
"""Before the key in the name of a client that has one; ZeroMQ's name for what authentication found."""


@dataclasses.dataclass(frozen=True)
class ClientCurve:
    """A client's keys for one worker."""

    pair: KeyPair
    server: bytes


class AuthorisedClients:
    """The public keys of the clients that a worker serves, read again when files change.

    Args:
        folder: of ``*.pub`` files; a file added or removed counts at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: list[tuple[str, int, int]] | None = None
        self._keys: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this Z85 public key may connect, as ``zmq.auth`` asks it."""
        keys = self.keys()
        return keys is not None and key in keys

    def keys(self) -> frozenset[bytes] | None:
        """The keys of all clients; None where they cannot be read now."""
        try:
            with self._lock:
                files = sorted(
                    (each.name, each.stat().st_mtime_ns, each.stat().st_size)
                    for each in os.scandir(self.folder)
                    if each.name.endswith(".pub")
                )
                if files != self._files:
                    keys = [self._read(self.folder / name) for name, _, _ in files]
                    self._keys, self._files = frozenset(key for key in keys if key is not None), files
                return self._keys
        except Exception as error:
            # The authenticator's thread, which asks, must not end: descriptors may run out, or the folder be away.
            log.warning("the authorised keys cannot be read: %s", error)
            return None

    @staticmethod
    def _read(file: Path) -> bytes | None:
        try:
            return read_public(file)
        except KeyFileError as error:
            log.warning("a client's key is skipped: %s", error)
            return None


@dataclasses.dataclass(frozen=True)
class ServerCurve:
    """A worker's key and the clients it serves."""

    pair: KeyPair
    clients: AuthorisedClients


def client_curve(address: Address, options: ZmqOptions) -> ClientCurve | None:
    """Read a client's keys for a worker; None for a connection without CURVE.

    The worker's public key is the first that exists of ``HOST_PORT.pub``, ``HOST.pub`` and ``worker.pub`` in the keys'
    folder; of one that moves, of ``NAME.pub`` and ``worker.pub``, where ``NAME`` is that of the file with its address.

    Raises:
        KeyFileError: a key is missing, damaged, or of the wrong side.
        SecurityError: plain TCP to another machine was asked for with ``insecure`` alone.
    """
    if _plain(address, options.insecure, options.no_authentication):
        return None
    folder = keys_folder(options.curve)
    host = address.host.strip("[]")
    own = (PurePosixPath(address.path).stem,) if address.moves else (f"{host}_{address.port}", host)
    names = [f"{name}.pub" for name in (*own, "worker")]
    public = next((folder / name for name in names if (folder / name).exists()), folder / "worker.pub")
    secret = _existing(folder / f"{options.client}.key")
    curve = ClientCurve(read_pair(secret), read_public(_existing(public)))
    if curve.pair.public == curve.server:
        raise KeyFileError(
            f"{secret} and {public} are of one pair: the first must be this client's, the second the worker's"
        )
    return curve


def server_curve(address: Address, options: ZmqServeOptions) -> ServerCurve | None:
    """Read a worker's key and its clients; None for connections without CURVE. Raises as ``client_curve``."""
    if _plain(address, options.insecure, options.no_authentication):
        if address.scheme == "tcp" and not address.loopback:
            log.warning("%s is served without authentication: anyone who can reach it can use this worker", address)
        return None
    folder = keys_folder(options.curve)
    pair = read_pair(_existing(folder / "worker.key"))
    clients = AuthorisedClients(folder / "clients")
    if any(file.name != "worker.key" for file in folder.glob("*.key")):
        log.warning(
            "a rehearsal: %s holds secret keys of clients beside the worker's. Where clients need not trust the "
            "machine there must be none: make them at the clients, and copy their .pub files here",
            folder,
        )
    if not any(clients.folder.glob("*.pub")):
        raise KeyFileError(f"no client is authorised: put clients' public keys in {clients.folder}")
    if pair.public in (clients.keys() or ()):
        raise KeyFileError(
            f"{folder / 'worker.key'} is the key of a client in {clients.folder}: the worker needs its own"
        )
    return ServerCurve(pair, clients)


def _plain(address: Address, insecure: bool, no_authentication: bool) -> bool:
    if address.scheme == "ipc" or no_authentication:
        return True
    if insecure and address.moves:
        raise SecurityError(f"insecure is for this machine only, and what {address} names may be another: use keys")
    if insecure and not address.loopback:
        raise SecurityError(
            f"insecure is for this machine only, and {address} is not: use keys (see 'ciphertune keys'), or say "
            "no_authentication to let anyone on the network read and alter traffic, use the worker, and pose as it"
        )
    return insecure


def _existing(file: Path) -> Path:
    if not file.exists():
        raise KeyFileError(
            f"the key file {file} is missing: make keys with 'ciphertune keys', or name their folder with the option "
            "curve or in CIPHERTUNE_KEYS"
        )
    return file
