"""Base class of plugins that record training runs."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ciphertune.errors import PluginError
from ciphertune.hookspecs import hookimpl

if TYPE_CHECKING:
    from ciphertune.traffic import Exchange


class Tracker:
    """Follows one training run at a time: subclass, set ``Options``, and override ``begin``, ``record`` and ``end``.

    A run that starts while another one is followed is not recorded, and a warning says so. What is overridden is called
    on the thread that trains; errors are reported as those of any hook.

    Attributes:
        COUNTS: what is counted of the traffic, as in ``ciphertune.Traffic``.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("requests", "retries", "bytes_up", "bytes_down")

    def __init__(self) -> None:
        self._trainer: weakref.ref[Any] | None = None  # a trainer holds its model, which must not live on here
        self._running = False
        self._early: tuple[weakref.ref[Any], int, dict[str, float]] | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._counting = threading.Lock()

    def begin(self, trainer: Any, total_steps: int, start_step: int) -> None:
        """A run begins, or resumes: what was recorded of steps after ``start_step`` is to be forgotten."""

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Something was measured.

        Args:
            kind: ``step`` or ``evaluation``. Evaluations may come after the end of the run; the last one before its
                beginning comes right after ``begin``.
            step: optimizer steps done.
            metrics: those of the hook, and ``COUNTS`` since the last call, of all sessions.
        """

    def end(self, step: int, reason: str) -> None:
        """The run ended: ``finished``, ``interrupted`` or ``failed``. It may go on later, from an earlier step."""

    def close(self) -> None:
        """Let go of everything; called once no hook will come any more. Idempotent."""

    @hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        """Count."""
        with self._counting:
            for name in self.COUNTS:
                self._counts[name] += getattr(exchange, name)

    @hookimpl
    def ciphertune_training_start(self, trainer: Any, total_steps: int, start_step: int) -> None:
        """Follow the run."""
        followed = self._trainer() if self._trainer is not None and self._running else None
        if followed is not None and followed is not trainer:
            raise PluginError("another run is being recorded; this one is not")
        self._trainer, self._running = None, False
        self.begin(trainer, total_steps, start_step)
        self._trainer, self._running = weakref.ref(trainer), True
        early, self._early = self._early, None
        if early is not None and early[0]() is trainer and early[1] == start_step:
            self.record("evaluation", start_step, early[2])
        self._take_counts()

    @hookimpl
    def ciphertune_training_step(self, trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Record it."""
        if self._follows(trainer):
            self.record("step", step, {**metrics, **self._take_counts()})

    @hookimpl
    def ciphertune_evaluation(self, trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Record it."""
        if self._follows(trainer):
            self.record("evaluation", step, {**metrics, **self._take_counts()})
        elif not self._running:
            self._early = weakref.ref(trainer), step, {**metrics, **self._take_counts()}

    @hookimpl
    def ciphertune_training_end(self, trainer: Any, step: int, reason: str) -> None:
        """Record it."""
        if self._follows(trainer) and self._running:
            self._running = False
            self.end(step, reason)

    def _follows(self, trainer: Any) -> bool:
        return self._trainer is not None and self._trainer() is trainer

    def _take_counts(self) -> dict[str, int]:
        with self._counting:
            counts, self._counts = self._counts, collections.Counter()
        return {name: counts[name] for name in self.COUNTS}
