"""How long threads keep a processor that others want as well, see sched_setattr(2)."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

LONG = 0.02
"""Seconds of a turn for threads that compute."""
SHORT = 0.001
"""Seconds of a turn for threads that pass on what has come: a short product of a worker fits in."""

# The system call sched_setattr; sched_getattr has the next number.
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


def take_turns(seconds: float) -> None:
    """Have the calling thread, and threads that it starts, keep the processor for so long at a time.

    Linux 6.12 and later let a thread that wakes up have the processor at once where its turns are shorter than those of
    the thread that has it. Among equals it waits, for a tick of the clock (4 ms) as it may be. Shares of the processor
    stay as they are. Elsewhere, and for threads whose scheduling an operator chose, nothing changes.
    """
    number = _number()
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    asked = _Attributes(ctypes.sizeof(_Attributes), os.SCHED_OTHER, 0, nice, 0, int(1e9 * seconds), 0, 0)
    # A refusal is no harm.
    ctypes.CDLL(None).syscall(number, 0, ctypes.byref(asked), 0)


def turn_seconds() -> float:
    """Seconds of the calling thread's turns; 0 where the system has one length for all."""
    number, found = _number(), _Attributes()
    if number is None or ctypes.CDLL(None).syscall(number + 1, 0, ctypes.byref(found), ctypes.sizeof(found), 0) != 0:
        return 0.0
    return float(found.runtime / 1e9)


def _number() -> int | None:
    return _CALLS.get(platform.machine()) if sys.platform.startswith("linux") else None
