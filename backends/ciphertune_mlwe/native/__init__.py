"""The compiled loops, where they could be built: found, declared and checked once."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

LIBRARY = "kernels.so"
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_SIGNATURES = {
    "transform_secrets": "ppi",
    "transform_rows": "piip",
    "pack_hints": "piiip",
    "masks": "pipiiipiip",
    "hint_masks": "ppiiip",
    "encrypt": "piipipiiipi",
    "encode": "piipidiiipp",
    "decrypt": "pipiipiiipi",
    "norms": "piiip",
    "weighted_sums": "piiiiipiipi",
    "agrees": "ppiipiipiiii",
    "split": "piiipii",
    "join": "piiiiip",
    "low_bits": "piip",
    "combine": "ppiiiip",
    "product": "ipiiiipiiiipipii",
    "product_name": "i",
    "product_available": "i",
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None where it was not built or ``CIPHERTUNE_NATIVE=0`` asks for the portable code."""
    path = Path(__file__).with_name(LIBRARY)
    if os.environ.get("CIPHERTUNE_NATIVE") == "0" or not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        declare(loaded)
    except (OSError, AttributeError):
        log.warning("%s is of another version or another machine: install the package again, or it is slow", path)
        return None
    loaded.ct_init()
    return loaded


def declare(loaded: ctypes.CDLL, prefix: str = "") -> None:
    """Tell ctypes the arguments of the library's functions, those whose names start with the prefix."""
    for name, arguments in _SIGNATURES.items():
        if name.startswith(prefix):
            getattr(loaded, f"ct_{name}").argtypes = [_KINDS[each] for each in arguments]
    loaded.ct_product_name.restype = ctypes.c_char_p


def library_for(tensor: Tensor) -> ctypes.CDLL | None:
    """The shared library where it can work on a tensor, which is on the CPU."""
    return library() if tensor.device.type == "cpu" else None


@functools.cache
def products(native: ctypes.CDLL) -> dict[str, int]:
    """The library's product kernels that this processor has, and their numbers."""
    found: dict[str, int] = {}
    index = 0
    while (name := native.ct_product_name(index)) is not None:
        if native.ct_product_available(index):
            found[name.decode()] = index
        index += 1
    return found


def pointer(tensor: Tensor) -> int:
    """Address of a CPU tensor's data; the caller keeps the tensor alive and has checked its layout."""
    return tensor.data_ptr()


def packed(tensor: Tensor) -> Tensor:
    """The tensor, copied unless neighbours of its last dimension lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Denormals as zeros, lest times tell of values; what is computed here is read as integers or is in range.
    return ThreadPoolExecutor(threads, "ciphertune-mlwe", torch.set_flush_denormal, (True,))


if hasattr(os, "register_at_fork"):
    # The threads of a pool are not there in a forked process: it would wait for them for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def thread_count() -> int:
    """Threads that the compiled loops use: as many as torch."""
    return torch.get_num_threads()


_here = threading.local()


def step_back() -> None:
    """Let the calling thread work alone, and only when the processor has nothing else to do (on Linux)."""
    _here.alone = True
    if sys.platform.startswith("linux"):
        # Whoever else wakes up takes the processor from such a thread at once, which niceness alone does not promise.
        # A refusal is no harm: the thread then takes its share.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


ALONE = 1 << 15
"""Values below which another thread is reached later than a loop ends."""


def parts(rows: int, multiple: int, values: int = ALONE) -> list[tuple[int, int]]:
    """Where the parts of a loop over rows begin and end, one for each thread; see ``over_rows``."""
    if values < ALONE or getattr(_here, "alone", False):
        return [(0, rows)]
    step = max(multiple, -(-rows // (thread_count() * multiple)) * multiple)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] or [(0, rows)]


def over_rows(rows: int, multiple: int, task: Callable[[int, int], None], values: int = ALONE) -> None:
    """Run ``task(start, stop)`` over all rows, on as many threads as ``thread_count`` says.

    Args:
        rows: number of rows.
        multiple: parts start at multiples of this.
        task: releases the interpreter lock for most of its time; its errors are raised here.
        values: that it handles in all; fewer than ``ALONE`` are left to the calling thread.
    """
    found = parts(rows, multiple, values)
    futures = [_pool(max(1, thread_count() - 1)).submit(task, *part) for part in found[1:]]
    try:
        task(*found[0])
    finally:
        # Buffers belong to the caller: nobody may still be writing to them when it goes on.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
