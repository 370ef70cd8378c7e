"""Rows of activations on this client's disk: encrypted, bounded, and given up wherever one is not what was written."""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import os
import secrets
import struct
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from ciphertune.cache import Hold, cache_folder, make_room
from ciphertune.errors import CacheError, KeyFileError
from ciphertune.key_files import keys_folder, make_keys_folder, read_key_file, write_key_file

PART = "activations"
"""Part of the cache that rows are in."""

KEY_FILE = "activations.secret"

_FORMAT = "ciphertune-activations-1"
_MAGIC = b"ctactivations 1\n"
_NONCE = 12
_TAG = 16
_MOST_SIZES = 6
_HEAD = struct.Struct(f"<BB{_MOST_SIZES}Q")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_RESERVED = 1 << 26
"""Bytes that room is asked for at once: asking reads the whole folder."""
_DRAFT = ".draft-"

log = logging.getLogger(__name__)


class RowStore:
    """Rows on disk, by the content that they are of.

    A file holds one row under AES-256-GCM, with a key of the user's on this machine, and its name is an HMAC of what
    the row is of: neither tells of the data without the key file. Rows are never replaced: of data that is read in
    turn, all of those that fit are found again.

    Args:
        context: SHA-256 of all that rows depend on beside the example.
        limit: bytes of all models' rows at most. Other models' go for new ones, oldest use first.

    Attributes:
        full: whether a row found no room.

    Raises:
        CacheError: the folder or the key cannot be made or read.
    """

    def __init__(self, context: bytes, limit: int) -> None:
        self._context = context
        self._limit = limit
        self._reserved = 0
        self.full = False
        self._folder = cache_folder(PART) / context.hex()[:32]
        try:
            secret = _secret()
            self._hold = Hold(self._folder, self._tidy)
        except KeyFileError as error:
            raise CacheError(f"frozen_cache: {error}") from None
        except OSError as error:
            raise CacheError(f"frozen_cache: {self._folder} cannot be made: {error.strerror}") from None
        self._names = hmac.digest(secret, b"names" + context, "sha256")
        self._cipher = AESGCM(hmac.digest(secret, b"rows" + context, "sha256"))

    def has(self, content: bytes) -> bool:
        """Whether there is a row of this content; it may turn out to be damaged."""
        return self._path(content).exists()

    def read(self, content: bytes, device: torch.device) -> Tensor | None:
        """The row of this content; None where there is none, or a damaged one, which is removed."""
        path = self._path(content)
        try:
            with path.open("rb") as file:
                head = file.read(len(_MAGIC) + _HEAD.size)
                shape, dtype = _read_head(head)
                size = math.prod(shape) * dtype.itemsize
                if os.fstat(file.fileno()).st_size != len(head) + _NONCE + size + _TAG:
                    raise ValueError
                sealed = file.read()
            plain = self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], path.name.encode() + head)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, InvalidTag) as error:
            why = error.strerror if isinstance(error, OSError) else "it was cut or altered"
            log.warning("kept activations in %s are not used, and made anew: %s", path, why)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        # A bytearray, since torch wants memory that can be written to.
        return torch.frombuffer(bytearray(plain), dtype=dtype).reshape(shape).to(device)

    def write(self, content: bytes, row: Tensor) -> bool:
        """Keep a row; False where there is no room for it any more."""
        if self.full:
            return False
        data = row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        head = _MAGIC + _HEAD.pack(_DTYPES.index(row.dtype), row.dim(), *row.shape, *[0] * (_MOST_SIZES - row.dim()))
        path, nonce = self._path(content), secrets.token_bytes(_NONCE)
        sealed = self._cipher.encrypt(nonce, data, path.name.encode() + head)
        draft = self._folder / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            if not self._room(len(head) + _NONCE + len(sealed)):
                self.full = True
                return False
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(head + nonce + sealed)
            draft.replace(path)
        except OSError as error:
            log.warning("activations are kept no longer: %s", error.strerror)
            self.full = True
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        return not self.full

    def close(self) -> None:
        """Let the rows be removed by whoever needs room. Idempotent."""
        self._hold.close()

    def _path(self, content: bytes) -> Path:
        return self._folder / hmac.digest(self._names, content, "sha256").hex()

    def _room(self, nbytes: int) -> bool:
        """Whether so many bytes may be written."""
        if self._reserved < nbytes:
            wanted = max(nbytes, min(_RESERVED, self._limit // 8))
            if make_room(PART, wanted, self._limit, self._folder):
                self._reserved = wanted
            elif make_room(PART, nbytes, self._limit, self._folder):
                self._reserved = nbytes
            else:
                return False
        self._reserved -= nbytes
        return True

    def _tidy(self) -> None:
        """Remove what a killed process was writing."""
        for draft in self._folder.glob(_DRAFT + "*"):
            draft.unlink(missing_ok=True)


def storable(value: Tensor) -> bool:
    """Whether rows of a tensor can be kept."""
    return value.dtype in _DTYPES and 1 <= value.dim() - 1 <= _MOST_SIZES


def _read_head(head: bytes) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a row. Raises ``ValueError``."""
    if len(head) != len(_MAGIC) + _HEAD.size or not head.startswith(_MAGIC):
        raise ValueError
    kind, count, *sizes = _HEAD.unpack(head[len(_MAGIC) :])
    if kind >= len(_DTYPES) or not 1 <= count <= _MOST_SIZES:
        raise ValueError
    return tuple(sizes[:count]), _DTYPES[kind]


def _secret() -> bytes:
    """The secret of this user on this machine, made when it is first asked for. The file has mode 0600."""
    folder = keys_folder(None)
    path = folder / KEY_FILE
    if not path.exists():
        make_keys_folder(folder)
        try:
            write_key_file(path, {"format": _FORMAT, "key": secrets.token_hex(32)})
        except KeyFileError:
            # Another process may have been first; both take its secret.
            if not path.exists():
                raise
    try:
        return bytes.fromhex(read_key_file(path, _FORMAT)["key"])
    except (KeyError, TypeError, ValueError):
        raise KeyFileError(f"{path} is damaged; remove it, and activations are kept anew") from None
