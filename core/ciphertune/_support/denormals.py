"""Denormal numbers as zeros: with them some processors take ten times as long, and times would tell of values."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_SMALLEST = [5e-324]
_here = threading.local()

ALONE = 1 << 15
"""Numbers, and multiply-adds of a product, below which torch computes in the calling thread alone (its grain size)."""


def flushes() -> bool:
    """Whether the calling thread takes denormal numbers for zeros."""
    return _SMALLEST[0] * 1.0 == 0.0


class flushing(contextlib.ContextDecorator):  # noqa: N801 - read as a verb
    """Flush denormals in the calling thread and in torch's threads that help it; also a decorator.

    Afterwards they are as the caller had them. Where the processor cannot do it, nothing changes. One may stand within
    another: the outer one gives back what either changed.

    Args:
        work: numbers or multiply-adds of the largest operation; below ``ALONE`` nobody helps, and helpers, which take
            as long to reach as such an operation takes, are left alone. None where it is not known.
    """

    def __init__(self, work: int | None = None) -> None:
        self._helped = work is None or work >= ALONE
        self._changed = self._told = False

    def _recreate_cm(self) -> flushing:
        return flushing(None if self._helped else 0)

    def __enter__(self) -> None:
        self._changed = not flushes() and torch.set_flush_denormal(True)
        if self._changed:
            _here.outer = self
        outer: flushing | None = getattr(_here, "outer", None)
        if self._helped and outer is not None and not outer._told:
            outer._told = True
            _tell_helpers()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._changed:
            _here.outer = None
            torch.set_flush_denormal(False)
            if self._told:
                _tell_helpers()


def flush_here() -> None:
    """Flush denormals in the calling thread from now on; those that it starts later inherit it."""
    torch.set_flush_denormal(True)


def _tell_helpers() -> None:
    """Give the calling thread's mode to the threads of torch's OpenMP pool, which took it over when they were made."""
    found, threads = _openmp(), torch.get_num_threads()
    if found is not None and threads > 1:
        run_in_team, get_mode, set_mode, mode = found
        here = mode()
        if get_mode(here) == 0:
            run_in_team(set_mode, here, threads, 0)


@functools.cache
def _openmp() -> tuple[Any, Any, Any, Any] | None:
    """What gives a thread's floating-point mode to the team of GNU's OpenMP library, as torch has loaded it.

    The mode is C's ``fenv_t``, of which flushing is a part, and ``fesetenv`` has the form of a task: no Python runs in
    the helpers. None where torch uses another library.
    """
    try:
        with Path("/proc/self/maps").open(encoding="utf-8") as maps:
            files = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
        (file,) = files
        run_in_team = ctypes.CDLL(file).GOMP_parallel
        run_in_team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run_in_team.restype = None
        mathematics = ctypes.CDLL(None)
        get_mode = mathematics.fegetenv
        set_mode = ctypes.cast(mathematics.fesetenv, ctypes.c_void_p)
    except (OSError, ValueError, AttributeError):
        return None
    # Larger than a fenv_t of any C library.
    return run_in_team, get_mode, set_mode, ctypes.c_uint64 * 16
