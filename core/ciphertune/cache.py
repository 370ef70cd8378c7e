"""The folder in which backends and transports keep what they can make again, by part and entry."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

from ciphertune.errors import CacheError

IN_USE = ".in-use"
"""File of an entry that whoever uses it has locked. The time of its last change is that of the last use."""


def cache_folder(part: str) -> Path:
    """The folder of one part, which need not exist.

    It is below ``CIPHERTUNE_CACHE``, else ``$XDG_CACHE_HOME/ciphertune``, else ``~/.cache/ciphertune``.
    """
    return _root() / part


@dataclasses.dataclass(frozen=True)
class Entry:
    """A folder of one part.

    Attributes:
        part, name: of the folder.
        path: the folder.
        nbytes: size of its files.
        last_used: seconds since the epoch.
    """

    part: str
    name: str
    path: Path
    nbytes: int
    last_used: float


def entries(part: str | None = None) -> list[Entry]:
    """What is in the cache, oldest use first.

    Raises:
        CacheError: the folder cannot be read.
    """
    try:
        parts = [cache_folder(part)] if part else sorted(_root().iterdir()) if _root().exists() else []
        found = [_entry(path) for each in parts if each.is_dir() for path in sorted(each.iterdir()) if path.is_dir()]
    except OSError as error:
        raise CacheError(f"the cache {_root()} cannot be read: {error.strerror}") from None
    return sorted(found, key=lambda entry: entry.last_used)


class Hold:
    """Keeps a folder from being removed while it is open, by a shared lock on a file in it.

    Args:
        path: the folder; made with mode 0700 if missing.
        alone: called first if nobody else uses it.

    Raises:
        OSError: the folder or its file cannot be made.
    """

    def __init__(self, path: Path, alone: Callable[[], object] | None = None) -> None:
        while True:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path / IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
            # One that is never closed ends with its object, and without a warning.
            self.close = weakref.finalize(self, os.close, handle)
            os.utime(path / IN_USE)
            if alone is not None and _lock(handle, shared=False):
                alone()
            if not _lock(handle, shared=True, wait=True) or _current(handle, path / IN_USE):
                return
            # It was removed meanwhile: once more with what is there now.
            self.close()


def remove(entry: Entry) -> bool:
    """Remove an entry; False where somebody uses it.

    Raises:
        CacheError: it cannot be removed.
    """
    try:
        with contextlib.ExitStack() as stack:
            mark = entry.path / IN_USE
            if mark.exists() and not _lock(stack.enter_context(mark.open("ab")).fileno(), shared=False):
                return False
            shutil.rmtree(entry.path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CacheError(f"{entry.path} cannot be removed: {error.strerror}") from None
    return True


def make_room(part: str, nbytes: int, limit: int, mine: Path) -> bool:
    """Remove the entries of a part that were not used for longest, until so much more may be written.

    Args:
        part: which part.
        nbytes: to be written.
        limit: bytes of the part at most.
        mine: an entry that stays.

    Returns:
        Whether there is room, both within the limit and on the disk. Where there cannot be, nothing is removed.

    Raises:
        CacheError: the folder cannot be read.
    """
    found = entries(part)
    kept = sum(entry.nbytes for entry in found if entry.path == mine)
    others = [entry for entry in found if entry.path != mine]
    if kept + nbytes > limit or nbytes > free_bytes(mine) + sum(entry.nbytes for entry in others):
        return False

    def fits() -> bool:
        held = kept + sum(each.nbytes for each in others)
        return held + nbytes <= limit and nbytes <= free_bytes(mine)

    for entry in list(others):
        if fits():
            break
        if remove(entry):
            others.remove(entry)
    return fits()


def free_bytes(path: Path) -> int:
    """Bytes that the disk of a folder, which need not exist, has left."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _root() -> Path:
    chosen = os.environ.get("CIPHERTUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored (XDG Base Directory Specification).
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "ciphertune"


def _entry(path: Path) -> Entry:
    nbytes = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = file.lstat()
            nbytes += 0 if file.is_dir() else status.st_size
    mark = path / IN_USE
    used = 0.0
    with contextlib.suppress(FileNotFoundError):
        used = (mark if mark.exists() else path).stat().st_mtime
    return Entry(path.parent.name, path.name, path, nbytes, used)


def _current(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":

    def _lock(handle: int, shared: bool, wait: bool = False) -> bool:
        # Open files cannot be removed there, which is all that the lock is for.
        return shared
else:
    import fcntl

    def _lock(handle: int, shared: bool, wait: bool = False) -> bool:
        """Lock a file; False where others have it locked, or the disk knows no locks."""
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            return False
        return True
