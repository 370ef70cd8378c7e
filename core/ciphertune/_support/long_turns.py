"""How long a thread that computes keeps its processor, see sched_setattr(2)."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

_SECONDS = 0.02
# Of sched_setattr; sched_getattr has the next one.
_CALLS = {"x86_64": 314, "aarch64": 274, "riscv64": 274}


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def take_long_turns() -> bool:
    """Have the calling thread, and threads that it starts, compute in long turns, which shorter ones may interrupt.

    Linux 6.12 and later let a thread that wakes up have the processor at once where its turns are shorter than those of
    the thread that computes; among equals it waits, for a tick of the clock (4 ms) as it may be. Shares of the
    processor stay as they are.

    Returns:
        Whether the system was asked; older ones do nothing then.
    """
    number = _CALLS.get(platform.machine()) if sys.platform.startswith("linux") else None
    # What an operator chose otherwise (SCHED_BATCH and the like) stays.
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    asked = _Attributes(ctypes.sizeof(_Attributes), os.SCHED_OTHER, 0, nice, 0, int(1e9 * _SECONDS), 0, 0)
    return ctypes.CDLL(None).syscall(number, 0, ctypes.byref(asked), 0) == 0


def turn_seconds() -> float:
    """Seconds of the calling thread's turns; 0 where the system does not tell."""
    number = _CALLS.get(platform.machine()) if sys.platform.startswith("linux") else None
    found = _Attributes()
    if number is None or ctypes.CDLL(None).syscall(number + 1, 0, ctypes.byref(found), ctypes.sizeof(found), 0) != 0:
        return 0.0
    return found.runtime / 1e9
