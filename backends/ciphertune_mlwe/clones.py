"""Noticing that a machine was copied: two copies of one mask would be used twice."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

OLDEST_SECONDS = 60.0
"""Age at which masks are dropped where the machine has nothing that tells of copies."""

_JUMP_SECONDS = 5.0
_DEVICE = Path("/dev/vmclock0")
_MAGIC = 0x4B4C4356  # "VCLK"
_absent: set[Path] = set()


def read_generation() -> int | None:
    """The disruption marker of the machine's VMClock page, which changes when it is copied; None where it has none.

    Layout: Woodhouse et al., "VMClock", Linux ``include/uapi/linux/vmclock-abi.h``. Never run on a real device: a fake
    stands for it in tests.
    """
    # Asked before every request: opened as plainly as can be, and not at all where it is not there.
    if _DEVICE in _absent:
        return None
    try:
        device = os.open(_DEVICE, os.O_RDONLY)
    except FileNotFoundError:
        _absent.add(_DEVICE)
        return None
    except OSError:
        return None
    try:
        page = os.read(device, 24)
    except OSError:
        return None
    finally:
        os.close(device)
    if len(page) < 24:
        return None
    magic, marker = struct.unpack("<I12xQ", page)
    return int(marker) if magic == _MAGIC else None


class CloneWatch:
    """Tells whether masks that were made may still be used.

    With a generation that the machine provides, until it changes; without one, for a minute, and until the wall clock
    jumps against the clock that goes on in sleep. This makes a second use less likely and does not prevent it: whoever
    resumes one snapshot of memory twice must make masks neither ahead nor in banks.

    Args:
        generation: reads the machine's generation, None where there is none.
        wall, boot: clocks, in seconds; the second goes on while the machine sleeps, and is set by nobody.
    """

    def __init__(
        self,
        generation: Callable[[], int | None] = read_generation,
        wall: Callable[[], float] = time.time,
        boot: Callable[[], float] | None = None,
    ) -> None:
        self._generation = generation
        self._wall = wall
        self._boot = boot if boot is not None else _boot_clock
        self._known = generation()
        self._ahead = self._wall() - self._boot()

    def copied(self) -> bool:
        """Whether the machine may have been copied since this was last asked."""
        found = self._generation()
        ahead = self._wall() - self._boot()
        changed = found != self._known or (found is None and abs(ahead - self._ahead) > _JUMP_SECONDS)
        self._known, self._ahead = found, ahead
        return changed

    def now(self) -> float:
        """The time to note of masks that were made."""
        return self._boot()

    def fresh(self, made: float) -> bool:
        """Whether masks made at a time of ``now`` may still be used."""
        return self._known is not None or self._boot() - made <= OLDEST_SECONDS


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform.startswith("linux") else time.monotonic()
