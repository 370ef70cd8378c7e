"""Seconds that other processes have had of the processors."""

from __future__ import annotations

import sys
import time


def processor_seconds(pid: int) -> float | None:
    """Seconds that all threads of a process have computed; None where the system does not say, or it has ended."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        # As clock_getcpuclockid(3) makes it, which Python does not have.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None
