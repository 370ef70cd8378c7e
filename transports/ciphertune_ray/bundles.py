"""Reading a worker's part of a bundle, from a path that the machines share or an object store that fsspec reaches."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ciphertune._support.bundle_names import WORKER_MANIFEST
from ciphertune.bundle.worker import read_blocks
from ciphertune.cache import cache_folder
from ciphertune.errors import ConfigError

log = logging.getLogger(__name__)

_LARGEST_MANIFEST = 1 << 28
_Loaded = TypeVar("_Loaded")

Block = tuple[list[str], int]
"""The layers of a block, and its bytes."""


def parts_of(url: str) -> list[str]:
    """The workers' folders of a bundle: itself, its ``worker``, or its ``worker-0``, ``worker-1`` ….

    Args:
        url: a path, or a URL that fsspec reads.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    store = _Store(url)
    if store.exists(WORKER_MANIFEST):
        return [url]
    if store.exists(f"worker/{WORKER_MANIFEST}"):
        return [store.join("worker")]
    found: list[str] = []
    while store.exists(f"worker-{len(found)}/{WORKER_MANIFEST}"):
        found.append(store.join(f"worker-{len(found)}"))
    if not found:
        raise ConfigError(
            f"{url} holds no {WORKER_MANIFEST} that this machine can read: name a bundle that 'ciphertune split' "
            "wrote, on a path that all machines of the cluster share, or in an object store"
        )
    return found


def blocks_of(url: str) -> list[Block]:
    """List the blocks in a worker's folder.

    Raises:
        ConfigError: it cannot be read, or is damaged.
    """
    folder = _Store(url).local(WORKER_MANIFEST)
    return [
        ([s.name for s in shards], sum(s.rows * s.in_features * (s.weight_bits or 32) // 8 for s in shards))
        for _, shards in read_blocks(folder)
    ]


def fetch_and_load(url: str, layers: Sequence[str], load: Callable[[Path], _Loaded]) -> _Loaded:
    """Fetch the files of some layers to this machine if need be, and load them.

    Files from an object store are kept in ``~/.cache/ciphertune``, or where ``CIPHERTUNE_CACHE`` says. If loading finds
    them damaged they are fetched once more.

    Args:
        url: a worker's folder.
        layers: names; all if empty.
        load: called with the folder on this machine.

    Raises:
        ConfigError: the folder cannot be read, or is damaged.
    """
    store = _Store(url)
    folder = store.local(WORKER_MANIFEST)
    files = [file for file, shards in read_blocks(folder) if not layers or {s.name for s in shards} & set(layers)]
    names = [str(file.relative_to(folder)) for file in files]
    for name in names:
        store.local(name)
    try:
        return load(folder)
    except ConfigError:
        if not store.remote:
            raise
        log.warning("the kept copy of %s is damaged and is fetched again", url)
        for name in names:
            (folder / name).unlink(missing_ok=True)
            store.local(name)
        return load(folder)


class _Store:
    """A folder on this machine or in an object store."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.remote = "://" in url and not url.startswith("file://")
        self._folder: Path | None = None if self.remote else Path(url.removeprefix("file://"))
        if self.remote:
            try:
                import fsspec

                self._files: Any
                self._files, self._root = fsspec.core.url_to_fs(url)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"the bundle {url} cannot be reached: {error}") from error

    def join(self, name: str) -> str:
        """The address of a file or folder in it."""
        return f"{self._url.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether it has a file of this name."""
        if self._folder is not None and not self.remote:
            return (self._folder / name).is_file()
        try:
            return bool(self._files.isfile(f"{self._root}/{name}"))
        except Exception as error:
            raise ConfigError(f"the bundle {self._url} cannot be reached: {type(error).__name__}: {error}") from error

    def local(self, name: str) -> Path:
        """Fetch a file to this machine if need be; the folder there. The manifest is fetched first."""
        if not self.remote:
            assert self._folder is not None
            return self._folder
        if self._folder is None:
            raw = self._read(WORKER_MANIFEST)
            # Named by the manifest, so that another bundle at the same address gets another folder.
            self._folder = cache_folder("bundles") / hashlib.sha256(raw).hexdigest()
            _write(self._folder / WORKER_MANIFEST, lambda file: file.write_bytes(raw))
        target = self._folder / name
        if not target.exists():
            _write(target, lambda file: self._get(name, file))
        return self._folder

    def _read(self, name: str) -> bytes:
        try:
            with self._files.open(f"{self._root}/{name}", "rb") as file:
                raw: bytes = file.read(_LARGEST_MANIFEST + 1)
        except Exception as error:
            raise ConfigError(f"{self._url}/{name} cannot be read: {type(error).__name__}: {error}") from error
        if len(raw) > _LARGEST_MANIFEST:
            raise ConfigError(f"{self._url}/{name} is too large to be a manifest")
        return raw

    def _get(self, name: str, file: Path) -> None:
        try:
            self._files.get_file(f"{self._root}/{name}", str(file))
        except Exception as error:
            raise ConfigError(f"{self._url}/{name} cannot be fetched: {type(error).__name__}: {error}") from error


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all; several workers of one machine may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        write(draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
