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

_PART = "concrete-circuit"
_VARIABLE = "CIPHERTUNE_CIRCUITS_MB"
_DEFAULT_MB = 16 << 10


def cache_folder() -> Path:
    """Folder of compiled circuits, made with mode 0700 if missing: ``concrete-circuit`` of the cache.

    Circuits hold weights, and are libraries that this process executes.

    Raises:
        PluginError: it cannot be made, or belongs to, or can be written by, somebody else. The path is in the log only,
            for the text goes to clients.
    """
    folder = cache.cache_folder(_PART)
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


def limit_bytes() -> int:
    """Bytes that compiled circuits may take on disk: ``CIPHERTUNE_CIRCUITS_MB``, of 2²⁰ bytes, else 16 GiB.

    Raises:
        PluginError: the variable is no whole number from 1.
    """
    text = os.environ.get(_VARIABLE, str(_DEFAULT_MB))
    if not text.isdigit() or int(text) < 1:
        raise PluginError(f"{_VARIABLE} must be a whole number of megabytes, 1 or more")
    return int(text) << 20


def find_or_make(key: str, make: Callable[[Path], None]) -> Path:
    """The folder of one circuit. For a new one, those that were not used for longest go where the limit needs it.

    Circuits that a process has loaded stay, as does the new one, whatever its size.

    Args:
        key: hexadecimal.
        make: fills an empty folder; called where the circuit is not there yet. The folder shows under its name once
            that is done, or not at all. Two that make the same at a time do no harm.
    """
    root, limit = cache_folder(), limit_bytes()
    place = root / key
    if place.is_dir():
        return place
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
    try:
        # Nobody else takes it for a leftover.
        held = cache.Hold(temporary)
        try:
            make(temporary)
            if not cache.make_room(_PART, 0, limit, temporary):
                log.warning("compiled circuits in use take more than the limit of %d MB on disk", limit >> 20)
            try:
                temporary.rename(place)
            except OSError:
                # Whoever was faster made the same.
                if not place.is_dir():
                    raise
        finally:
            held.close()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def forget(place: Path) -> None:
    """Remove one circuit."""
    shutil.rmtree(place, ignore_errors=True)
