"""Folders that one process at a time may write to."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":

    @contextlib.contextmanager
    def alone(folder: Path) -> Iterator[bool]:
        """True: folders cannot be locked there."""
        yield True
else:
    import fcntl

    @contextlib.contextmanager
    def alone(folder: Path) -> Iterator[bool]:
        """Hold a folder within a ``with`` block; False where another process, or another block, holds it.

        Also where the disk knows no locks, it is True. No file is made: the folder itself is locked, until the process
        ends at the latest.

        Args:
            folder: exists.

        Raises:
            OSError: it cannot be opened.
        """
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass
            yield True
        finally:
            os.close(handle)
