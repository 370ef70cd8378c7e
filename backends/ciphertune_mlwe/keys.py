"""The secret key: 32 bytes from which all secret blocks are derived, and its file."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ciphertune.errors import KeyFileError
from ciphertune_mlwe.params import PARAMETER_SETS, ParameterSet
from ciphertune_mlwe.prg import SEED_BYTES, ternary

_FORMAT = "ciphertune-mlwe-key-1"
MAX_BLOCKS = 1 << 16


class MasterKey:
    """A secret key of one parameter set. Its bytes appear in no repr and cannot be pickled.

    Args:
        parameters: the parameter set.
        secret: 32 bytes.
    """

    __slots__ = ("_secret", "parameters")

    def __init__(self, parameters: ParameterSet, secret: bytes) -> None:
        if len(secret) != SEED_BYTES:
            raise KeyFileError(f"a master key has {SEED_BYTES} bytes, not {len(secret)}")
        self.parameters = parameters
        self._secret = bytes(secret)

    @classmethod
    def generate(cls, parameters: ParameterSet) -> MasterKey:
        """A fresh key from the operating system's generator."""
        return cls(parameters, secrets.token_bytes(SEED_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str], parameters: ParameterSet) -> MasterKey:
        """Read a key file.

        Raises:
            KeyFileError: missing, readable by others, damaged, or of another parameter set.
        """
        file = Path(path)
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
            text = file.read_text(encoding="ascii") if file.stat().st_size < 4096 else ""
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"cannot read the key file {file}: {type(error).__name__}") from None
        if os.name == "posix" and mode & 0o077:
            raise KeyFileError(f"the key file {file} can be read by others (mode {mode:04o}): run chmod 600 {file}")
        try:
            content = json.loads(text)
            form, name, secret = content["format"], content["parameters"], bytes.fromhex(content["secret"])
        except (ValueError, KeyError, TypeError):
            raise KeyFileError(f"{file} is damaged or not a key file") from None
        if form != _FORMAT:
            raise KeyFileError(f"{file} has format {form!r}, expected {_FORMAT!r}")
        if name != parameters.name:
            known = "" if name in PARAMETER_SETS else ", which this version does not know"
            raise KeyFileError(
                f"{file} is a key of {name!r}{known}, not of {parameters.name!r}: say params={name} or use another file"
            )
        return cls(parameters, secret)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a key file with mode 0600; an existing file is never overwritten.

        Raises:
            KeyFileError: the file exists or cannot be written; nothing half-written remains.
        """
        file = Path(path)
        content = {"format": _FORMAT, "parameters": self.parameters.name, "secret": self._secret.hex()}
        try:
            handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
        except OSError as error:
            raise KeyFileError(f"cannot write a key file in {file.parent}: {type(error).__name__}") from None
        try:
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                json.dump(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temporary, file)
        except FileExistsError:
            raise KeyFileError(f"{file} exists already; a key file is never overwritten") from None
        except OSError as error:
            raise KeyFileError(f"cannot write the key file {file}: {type(error).__name__}") from None
        finally:
            Path(temporary).unlink()

    def secret_block(self, index: int) -> Tensor:
        """Secret s_index as (rank, degree) float64 in {-1, 0, 1}."""
        if not 0 <= index < MAX_BLOCKS:
            raise ValueError(f"secret block {index} is out of range")
        shape = (self.parameters.rank, self.parameters.degree)
        values = ternary(self._secret, index, self.parameters.dimension)
        return torch.from_numpy(values).to(torch.float64).view(shape)

    def __repr__(self) -> str:
        return f"MasterKey({self.parameters.name!r}, secret hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key cannot be pickled")
