"""The end of a run that the process is asked for by a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from ciphertune.runs.results import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(Exception):  # noqa: N818 - not an error: the end that was asked for
    """A run ended after a step because a signal asked for it.

    Attributes:
        step: optimizer steps done.
        total: those of the whole run.
        signal: number of the signal.
    """

    def __init__(self, step: int, total: int, number: int) -> None:
        super().__init__(f"stopped after step {step} of {total}")
        self.step, self.total, self.signal = step, total, number


class Stoppable(Protocol):
    """What can end after the step under way, as ``LoraTrainer`` can."""

    def stop(self) -> None:
        """Ask for it."""


@dataclasses.dataclass
class Asked:
    """The signal that asked for the end; None so far."""

    signal: int | None = None


@contextlib.contextmanager
def stopping_on_signals(run: Stoppable, progress: Progress) -> Iterator[Asked]:
    """Within this context Ctrl-C and SIGTERM end a run after its step, and a second one ends it at once.

    On other threads than the main one, which get no signals, nothing changes.

    Args:
        run: what is ended.
        progress: called with a line when it is asked for.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if asked.signal is not None:
            raise KeyboardInterrupt
        asked.signal = number
        run.stop()
        line = "Ending after this step, with a checkpoint. Once more, and it ends at once."
        # A handler may interrupt a write to the same stream, which must not be entered twice.
        threading.Thread(target=progress, args=(line,), name="ciphertune-stopping", daemon=True).start()

    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield asked
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
