"""Hints and check vectors on disk, in files of which every piece is authenticated each time that it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from ciphertune.cache import Hold, cache_folder, make_room
from ciphertune.errors import CacheError, KeyFileError
from ciphertune.key_files import keys_folder, make_keys_folder, read_key_file, write_key_file
from ciphertune_mlwe.params import ParameterSet
from ciphertune_mlwe.transforms import hint_shape

PART = "mlwe-hints"
"""Part of the cache that hints are in."""

KEY_FILE = "mlwe-hints.secret"

_FORMAT = "ciphertune-mlwe-hints-1"
_MAGIC = b"ctmlwe hints 1\r\n"
_SALT = 16
_TAG = 16
_CHUNK = 1 << 22
_DRAFT = ".draft-"


@dataclasses.dataclass(frozen=True)
class ClientSecret:
    """What a client keeps between sessions.

    Attributes:
        seed: of public matrices; no secret.
        mac_key: authenticates hints on this disk; secret.
    """

    seed: bytes
    mac_key: bytes = dataclasses.field(repr=False)


def client_secret() -> ClientSecret:
    """The secret of this user on this machine, made when it is first asked for. The file has mode 0600.

    Raises:
        KeyFileError: it cannot be made or read, or others can read it.
    """
    folder = keys_folder(None)
    path = folder / KEY_FILE
    if not path.exists():
        make_keys_folder(folder)
        made = {"format": _FORMAT, "seed": secrets.token_hex(32), "mac_key": secrets.token_hex(32)}
        try:
            write_key_file(path, made)
        except KeyFileError:
            # Another process may have been first; both take its secret.
            if not path.exists():
                raise
    found = read_key_file(path, _FORMAT)
    try:
        return ClientSecret(bytes.fromhex(found["seed"]), bytes.fromhex(found["mac_key"]))
    except (KeyError, TypeError, ValueError):
        raise KeyFileError(f"{path} is damaged; remove it, and hints are made anew") from None


class SealedFile:
    """Bytes on disk, written once and read in pieces of a few megabytes, each of them authenticated.

    Args:
        path: the file.
        key: that its pieces are authenticated by, less the file's salt.
        shape: of the bytes as a tensor; pieces are ranges of its first dimension.
        device: where pieces are wanted.
    """

    def __init__(self, path: Path, key: bytes, shape: tuple[int, ...], device: torch.device) -> None:
        self._path = path
        self._key = key
        self._shape = shape
        self._device = device
        row = math.prod(shape[1:])
        self._step = max(1, _CHUNK // row)
        chunks = -(-shape[0] // self._step)
        self._size = len(_MAGIC) + _SALT + chunks * _TAG + shape[0] * row

    @property
    def nbytes(self) -> int:
        """Bytes without tags."""
        return math.prod(self._shape)

    def exists(self) -> bool:
        """Whether the file is there, whole."""
        try:
            return self._path.stat().st_size == self._size
        except OSError:
            return False

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """All of it in order, each part with the index that it starts at; a part's memory serves the next one too.

        Raises:
            CacheError: the file is gone, or is not what was written. It is removed.
        """
        try:
            with self._path.open("rb", buffering=0) as file:
                yield from self._read(file)
        except (OSError, _AlteredError) as error:
            self.remove()
            why = "was cut or altered" if isinstance(error, _AlteredError) else f"cannot be read: {error.strerror}"
            raise CacheError(
                f"what was kept in {self._path} {why}. It was given up; open the session again to make it anew"
            ) from None

    def expect(self) -> None:
        """Let the system read the file ahead."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self._path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def whole(self) -> Tensor:
        """All of it, in memory. Raises as ``parts``."""
        out = torch.empty(self._shape, dtype=torch.uint8, device=self._device)
        for first, part in self.parts():
            out[first : first + len(part)] = part
        return out

    def verify(self) -> None:
        """Read everything once. Raises as ``parts``."""
        for _ in self.parts():
            pass

    def write(self, content: Tensor) -> None:
        """Write the file whole or not at all. Raises ``OSError``."""
        salt = secrets.token_bytes(_SALT)
        mac = self._mac(salt)
        draft = self._path.parent / f"{_DRAFT}{self._path.name}-{secrets.token_hex(4)}"
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
                _write(file, _MAGIC + salt)
                for index, start in enumerate(range(0, self._shape[0], self._step)):
                    data = content[start : start + self._step].cpu().contiguous().view(-1).numpy().data
                    _write(file, _tag(mac, index, data))
                    _write(file, data)
            draft.replace(self._path)
        finally:
            draft.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self, file: Any) -> Iterator[tuple[int, Tensor]]:
        head = file.read(len(_MAGIC) + _SALT)
        if head[: len(_MAGIC)] != _MAGIC or len(head) != len(_MAGIC) + _SALT:
            raise _AlteredError
        mac = self._mac(head[len(_MAGIC) :])
        count, *rest = self._shape
        room = torch.empty(min(self._step, count), *rest, dtype=torch.uint8)
        for index, start in enumerate(range(0, count, self._step)):
            part = room[: min(self._step, count - start)]
            view = part.view(-1).numpy().data
            tag = file.read(_TAG)
            filled = 0
            while filled < len(view) and (got := file.readinto(view[filled:])):
                filled += got
            if filled < len(view) or not hmac.compare_digest(tag, _tag(mac, index, view)):
                raise _AlteredError
            yield start, part.to(self._device)
        if file.read(1):
            raise _AlteredError

    def _mac(self, salt: bytes) -> AESGCM:
        """A key for this writing of this file: with it every piece has a number that is used once."""
        return AESGCM(hmac.digest(self._key, self._path.name.encode() + salt, "sha256"))


class HintCache:
    """The hints of one client and one model on disk, held against removal while it is open.

    Args:
        model: SHA-256 over the model's layers.
        secret: of the client.
        limit: bytes of all models' hints at most.
        device: where hints are wanted.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, model: bytes, secret: ClientSecret, limit: int, device: torch.device) -> None:
        self._context = hashlib.sha256(_MAGIC + secret.seed + model).digest()
        self._folder = cache_folder(PART) / self._context.hex()[:32]
        self._secret = secret
        self._limit = limit
        self._device = device
        self._held = Hold(self._folder, self._tidy)

    def of(self, identity: str, rows: int, parameters: ParameterSet) -> SealedFile:
        """The place of one product's hints, whether they are there or not.

        Args:
            identity: of the product's map: its direction, and sizes, bits and row digests of its layers in order.
            rows: of the hints.
            parameters: of the product's ciphertexts.
        """
        return self._file(f"{parameters.name}|{identity}", "hints", hint_shape(rows, parameters))

    def checks_of(self, identity: str, cuts: Sequence[int], nbytes: int) -> SealedFile:
        """The place of a group's check vectors, which are secret.

        Args:
            identity: of the group's forward map.
            cuts: rows at which pieces may begin and end.
            nbytes: of the vectors.
        """
        return self._file(f"{identity}|{','.join(map(str, cuts))}", "checks", (nbytes,))

    def _file(self, what: str, kind: str, shape: tuple[int, ...]) -> SealedFile:
        name = hashlib.sha256(self._context + kind.encode() + b"|" + what.encode()).hexdigest()
        return SealedFile(self._folder / f"{name}.{kind}", self._secret.mac_key, shape, self._device)

    def make_room(self, nbytes: int) -> bool:
        """Whether so many bytes more can be written; other models' hints go for them, oldest use first.

        Raises:
            CacheError: the folder cannot be read.
        """
        return make_room(PART, nbytes, self._limit, self._folder)

    def close(self) -> None:
        """Let the hints be removed by whoever needs room."""
        self._held.close()

    def _tidy(self) -> None:
        """Remove what a killed process was writing."""
        for draft in self._folder.glob(_DRAFT + "*"):
            draft.unlink(missing_ok=True)


class _AlteredError(Exception):
    """A file is not what was written."""


def _write(file: Any, data: Any) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _tag(mac: AESGCM, index: int, data: Any) -> bytes:
    """GMAC (NIST SP 800-38D): the tag of AES-GCM for nothing encrypted."""
    return mac.encrypt(index.to_bytes(12, "big"), b"", data)
