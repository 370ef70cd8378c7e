"""The secret key: 32 bytes from which all secret blocks are derived, and its file."""

from __future__ import annotations

import os
import secrets
from typing import NoReturn

import torch
from torch import Tensor

from ciphertune.errors import KeyFileError
from ciphertune.key_files import read_key_file, write_key_file
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
        content = read_key_file(path, _FORMAT)
        try:
            name, secret = content["parameters"], bytes.fromhex(content["secret"])
        except (ValueError, KeyError, TypeError):
            raise KeyFileError(f"{path} is damaged or not a key file") from None
        if name != parameters.name:
            known = "" if name in PARAMETER_SETS else ", which this version does not know"
            raise KeyFileError(
                f"{path} is a key of {name!r}{known}, not of {parameters.name!r}: say params={name} or use another file"
            )
        return cls(parameters, secret)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a key file with mode 0600; an existing file is never overwritten.

        Raises:
            KeyFileError: the file exists or cannot be written; nothing half-written remains.
        """
        write_key_file(path, {"format": _FORMAT, "parameters": self.parameters.name, "secret": self._secret.hex()})

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
