"""Compiled loops over rows on all threads: on torch's own, which are awake after its operations, where they are GNU's.

Threads of a pool of ours take twenty times as long to reach there: torch's wait for work in a loop, and the processor
that one of ours needs is taken.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ciphertune_mlwe import native

_ARGUMENTS = 16
_NO_MEMORY = "the native loops could not allocate their scratch memory"

Call = tuple[str, Sequence[int]]
"""A loop, by its name in the library without ``ct_``, and its arguments: numbers, addresses among them."""


class _Call(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_int64 * _ARGUMENTS),
        ("status", ctypes.c_int64),
    )


class _Team(ctypes.Structure):
    _fields_ = (
        ("calls", ctypes.POINTER(_Call)),
        ("count", ctypes.c_int64),
        ("number", ctypes.c_void_p),
        ("members", ctypes.c_void_p),
    )


def spread(
    library: ctypes.CDLL, rows: int, multiple: int, calls: Callable[[int, int], list[Call]], values: int = native.ALONE
) -> None:
    """Make the calls of all rows, on as many threads as ``native.thread_count`` says.

    Args:
        library: of the loops.
        rows: number of rows.
        multiple: parts start at multiples of this.
        calls: those of some rows, from one to another one, as many for any; they are made at any time, in any order.
        values: that they handle in all; fewer than ``native.ALONE`` are left to the calling thread.

    Raises:
        MemoryError: a loop could not allocate its scratch memory.
    """
    parts = native.parts(rows, multiple, values)
    if len(parts) == 1:
        _make(library, calls(*parts[0]))
        return
    openmp = None if _forked else _openmp(library)
    if openmp is None:
        native.over_rows(rows, multiple, lambda first, last: _make(library, calls(first, last)), values)
        return
    made = [calls(*part) for part in parts]
    # The calls of one part stand as far apart as there are threads, which makes them those of one.
    in_turn = [made[part][index] for index in range(len(made[0])) for part in range(len(parts))]
    array = (_Call * len(in_turn))()
    for each, (name, arguments) in zip(array, in_turn, strict=True):
        each.function = _address(library, name)
        each.arguments[: len(arguments)] = arguments
    run, number, members, task = openmp
    run(task, ctypes.byref(_Team(array, len(array), number, members)), len(parts), 0)
    if any(each.status for each in array):
        raise MemoryError(_NO_MEMORY)


def _make(library: ctypes.CDLL, calls: list[Call]) -> None:
    for name, arguments in calls:
        # What loops without a result return is anything.
        if getattr(library, f"ct_{name}")(*arguments) and name in ("product", "masks", "hint_masks"):
            raise MemoryError(_NO_MEMORY)


@functools.cache
def _address(library: ctypes.CDLL, name: str) -> int:
    found = ctypes.cast(getattr(library, f"ct_call_{name}"), ctypes.c_void_p).value
    assert found is not None
    return found


@functools.cache
def _openmp(library: ctypes.CDLL) -> tuple[Any, int | None, int | None, ctypes.c_void_p] | None:
    """What runs a task on all threads of GNU's OpenMP library, as torch has loaded it for the process."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        loaded = ctypes.CDLL(None)
        run = loaded.GOMP_parallel
        number, members = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (loaded.omp_get_thread_num, loaded.omp_get_num_threads)
        )
        task = ctypes.cast(library.ct_team, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run, number, members, task


# A forked process has none of these threads, and GNU's library waits for them for ever.
_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
