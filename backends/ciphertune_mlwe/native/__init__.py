"""The compiled loops, where they could be built: found, declared and checked once."""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = "kernels.so"
_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None where it was not built or ``CIPHERTUNE_NATIVE=0`` asks for the portable code."""
    path = Path(__file__).with_name(LIBRARY)
    if os.environ.get("CIPHERTUNE_NATIVE") == "0" or not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        return None
    loaded.ct_transform_secrets.argtypes = [_POINTER, _POINTER, _INT]
    loaded.ct_encrypt.argtypes = [
        *(_POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER),
        *(_INT, _INT, _INT, _INT, _INT, _POINTER),
    ]
    loaded.ct_encrypt.restype = ctypes.c_int
    loaded.ct_decrypt.argtypes = [*(_POINTER,) * 4, *(_INT,) * 5, _POINTER, _INT]
    loaded.ct_decrypt.restype = ctypes.c_int
    loaded.ct_combine.argtypes = [_POINTER, _POINTER, *(_INT,) * 4, _POINTER, *(_INT,) * 4]
    loaded.ct_init()
    return loaded


def pointer(tensor: Tensor) -> int:
    """Address of a CPU tensor's data; the caller keeps the tensor alive and has checked its layout."""
    return tensor.data_ptr()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ciphertune-mlwe")


def thread_count() -> int:
    """Threads that the compiled loops use: as many as torch."""
    return torch.get_num_threads()


def over_rows(rows: int, multiple: int, task: Callable[[int, int], None]) -> None:
    """Run ``task(start, stop)`` over all rows, on as many threads as ``thread_count`` says.

    Args:
        rows: number of rows.
        multiple: parts start at multiples of this.
        task: releases the interpreter lock for most of its time; its errors are raised here.
    """
    threads = thread_count()
    step = max(multiple, -(-rows // (threads * multiple)) * multiple)
    parts = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    futures = [_pool(max(1, threads - 1)).submit(task, *part) for part in parts[1:]]
    try:
        task(*parts[0])
    finally:
        # Buffers belong to the caller: nobody may still be writing to them when it goes on.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
