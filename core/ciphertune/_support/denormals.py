"""Denormal numbers as zeros: with them some processors take ten times as long, and times would tell of values."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

_SMALLEST = [5e-324]


def flushes() -> bool:
    """Whether the calling thread takes denormal numbers for zeros."""
    return _SMALLEST[0] * 1.0 == 0.0


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Flush denormals in the calling thread and in torch's threads that help it; also a decorator.

    Afterwards they are as the caller had them. Where the processor cannot do it, nothing changes.
    """
    if flushes() or not torch.set_flush_denormal(True):
        yield
        return
    _tell_helpers(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        _tell_helpers(False)


def flush_here() -> None:
    """Flush denormals in the calling thread from now on; those that it starts later inherit it."""
    torch.set_flush_denormal(True)


_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _tell_helpers(flush: bool) -> None:
    """Set it in the threads of torch's OpenMP pool, which took it over from their maker when they were made."""
    library, threads = _openmp(), torch.get_num_threads()
    if library is not None and threads > 1:
        task = _Task(lambda _: torch.set_flush_denormal(flush))
        library.GOMP_parallel(task, None, threads, 0)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP library as torch has loaded it; None where torch uses another one."""
    try:
        with Path("/proc/self/maps").open(encoding="utf-8") as maps:
            files = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
        (file,) = files
        library = ctypes.CDLL(file)
        library.GOMP_parallel.argtypes = [_Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except (OSError, ValueError, AttributeError):
        return None
    return library
