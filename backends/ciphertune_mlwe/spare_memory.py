"""Mappings in which masks were, wiped and kept for masks of the same size, since fresh pages cost a fifth of these."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading

import numpy as np

MOST_BYTES = 1 << 28
"""Memory that is kept at most."""

# Linux has these: out of core dumps, wiped in forks (which Python has no name for), and in large pages, of which fewer
# have to be mapped.
_ADVICE = (
    (getattr(mmap, "MADV_DONTDUMP", 16), 18, getattr(mmap, "MADV_HUGEPAGE", 14))
    if sys.platform.startswith("linux")
    else ()
)
_FREE_REFERENCES = 3
"""To a mapping that only ``SpareMemory.give``, its caller and the count itself know of."""


class SpareMemory:
    """Private anonymous mappings of this process, by their size. Safe to use from several threads.

    Attributes:
        nbytes: kept now.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._kept: dict[int, list[mmap.mmap]] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> mmap.mmap:
        """A mapping of so many bytes, all zeros."""
        with self._lock:
            if kept := self._kept.get(nbytes):
                self.nbytes -= nbytes
                return kept.pop()
        return _mapping(nbytes)

    def give(self, mapping: mmap.mmap) -> None:
        """Take back a mapping that the caller forgets, if nothing else shows it; wiped before another one gets it.

        Whatever a tensor still shows, and somebody may be writing to, goes back to the system with that tensor.
        """
        if sys.getrefcount(mapping) > _FREE_REFERENCES:
            return
        nbytes = len(mapping)
        if self.nbytes + nbytes > MOST_BYTES:
            return
        np.frombuffer(mapping, dtype=np.uint8).fill(0)
        with self._lock:
            if self.nbytes + nbytes <= MOST_BYTES:
                self._kept.setdefault(nbytes, []).append(mapping)
                self.nbytes += nbytes

    def clear(self) -> None:
        """Give all of it back to the system."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0


def _mapping(nbytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in _ADVICE:
        # Old kernels know one of them or none; the process is compared too.
        with contextlib.suppress(OSError):
            memory.madvise(advice)
    return memory


SPARE = SpareMemory()
"""Of this process."""


def _forked() -> None:
    """A fork has zeros in its parent's mappings, and its lock may be held by a thread that is gone."""
    SPARE.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
