"""Compiled circuits on the worker's disk, by a hash of all that they are made from."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ciphertune import cache
from ciphertune.errors import PluginError

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Folder of compiled circuits, made with mode 0700 if missing: ``concrete-circuit`` of the cache.

    Circuits hold weights, and are libraries that this process executes.

    Raises:
        PluginError: it cannot be made, or belongs to, or can be written by, somebody else. The path is in the log only,
            for the text goes to clients.
    """
    folder = cache.cache_folder("concrete-circuit")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        log.error("no cache of circuits at %s: %s", folder, error)
        raise PluginError("the folder of compiled circuits cannot be made: set CIPHERTUNE_CACHE") from None
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if os.name == "posix" and not (private and status.st_uid == os.geteuid()):
        log.error("%s is open to others: run chmod 700, or remove it", folder)
        raise PluginError("the folder of compiled circuits is open to other users: make it mode 0700, or remove it")
    return folder


def find_or_make(key: str, make: Callable[[Path], None]) -> Path:
    """The folder of one circuit.

    Args:
        key: hexadecimal.
        make: fills an empty folder; called where the circuit is not there yet. The folder shows under its name once
            that is done, or not at all. Two that make the same at a time do no harm.
    """
    root = cache_folder()
    place = root / key
    if place.is_dir():
        return place
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
    try:
        make(temporary)
        try:
            temporary.rename(place)
        except OSError:
            # Whoever was faster made the same.
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def forget(place: Path) -> None:
    """Remove one circuit."""
    shutil.rmtree(place, ignore_errors=True)
