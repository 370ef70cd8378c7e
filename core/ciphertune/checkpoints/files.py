"""Safetensors, read with distrust: by name, one file open at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ciphertune.errors import ConfigError

INDEX = "model.safetensors.index.json"
"""The table of a folder whose tensors are in several files."""

_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDICES = (INDEX, "diffusion_pytorch_model.safetensors.index.json")
_LARGEST_INDEX = 1 << 28


class Header(NamedTuple):
    """What a file says of a tensor before any of it is read.

    Attributes:
        dtype: as safetensors names it: F32, BF16, F8_E4M3, I8 …
        shape: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


def inside(folder: Path, name: Any) -> Path:
    """A file that a manifest names, which must lie in its folder. Raises ``ConfigError``."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"the manifest in {folder} names a file outside it")
    return folder / name


def open_tensors(file: Path) -> Any:
    """A safetensors file, memory-mapped: tensors are views of its pages until they are moved or changed.

    Raises:
        ConfigError: missing, unreadable or damaged.
    """
    import safetensors

    try:
        with file.open("rb"):  # safetensors calls whatever the system refuses a missing file
            return safetensors.safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


def read_tensor(handle: Any, file: Path, name: str) -> Tensor:
    """Read one tensor of an open file. Raises ``ConfigError``."""
    import safetensors

    try:
        tensor: Tensor = handle.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: it holds no tensor {name!r}") from error
    except (AttributeError, KeyError, TypeError) as error:  # a dtype that the installed torch does not have
        raise ConfigError(f"{file}: {name!r} is of a dtype that this torch cannot read: {error}") from error
    return tensor


def tensor_header(handle: Any, file: Path, name: str) -> Header:
    """The dtype and shape that an open file says a tensor has. Raises ``ConfigError``."""
    import safetensors

    try:
        part = handle.get_slice(name)
        return Header(part.get_dtype(), tuple(part.get_shape()))
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: it holds no tensor {name!r}") from error


def tensor_shape(handle: Any, file: Path, name: str) -> tuple[int, ...]:
    """The shape that an open file says a tensor has. Raises ``ConfigError``."""
    return tensor_header(handle, file, name).shape


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, for a folder with safetensors, sharded or not; empty where there is none.

    Raises:
        ConfigError: the index or a file is damaged.
    """
    for index in (folder / name for name in _INDICES):
        if index.exists():
            if index.stat().st_size > _LARGEST_INDEX:
                raise ConfigError(f"{index} is too large to be a table of tensors")
            try:
                table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {str(name): inside(folder, file) for name, file in table.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ConfigError(f"{index} is damaged") from error
    single = next((folder / name for name in _SINGLE if (folder / name).exists()), None)
    return {} if single is None else dict.fromkeys(open_tensors(single).keys(), single)


class TensorFiles:
    """Tensors by name from the files of a folder, one file open at a time."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: tuple[Path, Any] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        """A memory-mapped tensor. Raises ``ConfigError``."""
        file, handle = self._handle(name)
        return read_tensor(handle, file, name)

    def headers(self) -> dict[str, Header]:
        """What the files say of every tensor. Raises ``ConfigError``."""
        found = {}
        for name in sorted(self._files, key=lambda name: str(self._files[name])):
            file, handle = self._handle(name)
            found[name] = tensor_header(handle, file, name)
        return {name: found[name] for name in self._files}

    def _handle(self, name: str) -> tuple[Path, Any]:
        file = self._files[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, open_tensors(file))
        return self._open
