"""The client's key pair, and the file that keeps it: making one takes seconds, and it is 134 MB."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ciphertune.errors import KeyFileError
from ciphertune.key_files import make_keys_folder, refuse_shared, write_parts
from ciphertune_concrete.glwe import wire
from ciphertune_concrete.glwe.library import load, other_layout, panics_are
from ciphertune_concrete.glwe.params import KEY_WORDS, NAME, PARAMETERS, PARAMETERS_JSON, SECRET_BYTES

log = logging.getLogger(__name__)

FILE = "concrete-glwe.key"
_FORMAT = "ciphertune-concrete-glwe-key-1"
_HEADER_BYTES = 1024
_FILE_BYTES = _HEADER_BYTES + SECRET_BYTES + 8 * KEY_WORDS

# One pair in memory serves all sessions of a process. Known by what the file system says of the file.
_loaded: weakref.WeakValueDictionary[tuple[Any, ...], KeyPair] = weakref.WeakValueDictionary()
_loading = threading.Lock()


class KeyPair:
    """A private key and the compression key that goes with it. Shows neither and cannot be pickled.

    Attributes:
        library_key: the library's private key.
        parameters: the library's parameters.
        compression: (KEY_WORDS,) int64, public: what a worker evaluates with.
    """

    def __init__(self, secret: bytes, compression: Tensor) -> None:
        library = load()
        self.parameters = library.MatmulCryptoParameters.deserialize(PARAMETERS_JSON)
        self.library_key = library.PrivateKey.deserialize(secret)
        self.compression = compression

    def __repr__(self) -> str:
        return f"KeyPair({NAME!r}, secret hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key cannot be pickled")


def key_pair(keys: Path) -> KeyPair:
    """The pair kept in a folder, made and kept if there is none.

    Raises:
        KeyFileError: the file is damaged, cut short, of other parameters, readable by others, or cannot be written.
        PluginError: the library is not installed, or not one that this version knows.
    """
    load()
    file = keys / FILE
    with _loading:
        if not file.exists():
            _make(file)
        return _read(file)


def discard(keys: Path) -> None:
    """Remove the pair kept in a folder: requests under it were answered wrongly. Raises ``KeyFileError``."""
    try:
        with _loading:
            (keys / FILE).unlink(missing_ok=True)
    except OSError as error:
        raise KeyFileError(f"cannot remove the key file {keys / FILE}: {type(error).__name__}") from None


def _make(file: Path) -> None:
    log.warning("making a key for concrete-glwe, kept in %s: this takes some seconds, once", file)
    make_keys_folder(file.parent)
    library = load()
    with panics_are(KeyFileError, "concrete-ml-extensions could not make a key"):
        private, compression = library.cpu_create_private_key(
            library.MatmulCryptoParameters.deserialize(PARAMETERS_JSON)
        )
    secret, public = private.serialize(), wire.key_values(compression.serialize())
    if len(secret) != SECRET_BYTES:
        raise other_layout()
    header = json.dumps({"format": _FORMAT, "parameters": PARAMETERS, "sha256": _digest(secret, public)})
    try:
        write_parts(file, [header.encode("ascii").ljust(_HEADER_BYTES), secret, public])
    except KeyFileError:
        # Another process may have made one meanwhile: then that is the key.
        if not file.exists():
            raise


def _digest(secret: bytes | memoryview, public: memoryview) -> str:
    digest = hashlib.sha256(secret)
    digest.update(public)
    return digest.hexdigest()


def _read(file: Path) -> KeyPair:
    again = f"; delete {file} to have a new one made"
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            refuse_shared(file, status)
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            known = _loaded.get(identity)
            if known is not None:
                return known
            header = stream.read(_HEADER_BYTES)
            _check_header(file, header, again)
            if status.st_size != _FILE_BYTES:
                raise KeyFileError(
                    f"the key file {file} has {status.st_size} bytes, not {_FILE_BYTES}: it was cut short" + again
                )
            secret = stream.read(SECRET_BYTES)
            public = torch.empty(KEY_WORDS, dtype=torch.int64)
            view = public.numpy().data.cast("B")
            whole = stream.readinto(view) == len(view)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {file}: {type(error).__name__}") from None
    if not whole or _digest(secret, view) != json.loads(header)["sha256"]:
        raise KeyFileError(f"the key file {file} is damaged: its checksum does not hold" + again)
    with panics_are(KeyFileError, f"the key file {file} holds no key that concrete-ml-extensions can read" + again):
        pair = KeyPair(secret, public)
    _loaded[identity] = pair
    return pair


def _check_header(file: Path, header: bytes, again: str) -> None:
    try:
        content = json.loads(header)
        form, parameters, _ = content["format"], content["parameters"], str(content["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeyFileError(f"{file} is damaged or not a key file of concrete-glwe" + again) from None
    if form != _FORMAT:
        raise KeyFileError(f"{file} has format {form!r}, expected {_FORMAT!r}" + again)
    if parameters != PARAMETERS:
        wrong = "other parameters"
        if isinstance(parameters, dict):
            differ = [
                f"{k}={parameters.get(k)!r} instead of {v!r}" for k, v in PARAMETERS.items() if parameters.get(k) != v
            ]
            wrong = "other parameters: " + ", ".join(differ or ["more than this version knows"])
        raise KeyFileError(f"the key in {file} is of {wrong}" + again)
