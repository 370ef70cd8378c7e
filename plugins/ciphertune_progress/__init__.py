"""Progress bars for training, keys and preparation, on standard error where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ciphertune.hookspecs import hookimpl

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

interface = 1


class _Bar:
    """The bar of one training run, on the screen from construction to ``close``."""

    def __init__(self, trainer: Any, total_steps: int, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        bar = self

        class Doing(ProgressColumn):
            """What the run waits for at this moment."""

            def render(self, task: Task) -> Text:
                return Text(bar.doing(), style="dim")

        self.silent: dict[str, float] = {}
        self.product = ""
        self.trainer = trainer
        self.amount = 0.0
        self.seconds = 0.0
        self.progress: Progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            Doing(),
            console=Console(stderr=True),
            refresh_per_second=2,
            speed_estimate_period=600,  # a step on ciphertext may take minutes
        )
        self.task: TaskID = self.progress.add_task("training", total=total_steps, completed=start_step, note="")
        self.progress.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step: its loss, and the mean speed so far."""
        unit = "tokens" if "tokens" in metrics else "samples"
        self.amount += metrics.get(unit, 0.0)
        self.seconds += metrics.get("seconds", 0.0)
        note = f"loss {metrics.get('loss', float('nan')):.4f}"
        if self.seconds > 0:
            note += f"  {self.amount / self.seconds:.4g} {unit}/s"
        self.progress.update(self.task, completed=step, note=note)

    def doing(self) -> str:
        """What the run waits for: a worker that does not answer, with the time that it is left, or a product."""
        if self.silent:
            worker, until = next(iter(self.silent.items()))
            return f"waiting for {worker}, {max(0.0, until - time.monotonic()):.0f} s left"
        return self.product

    def close(self) -> None:
        """Leave the bar on the screen as it is and stop drawing it."""
        self.progress.stop()


# The terminal has room for one bar: the run that started last has it.
_bar: _Bar | None = None


# One line for each worker that a key is on its way to.
_keys: dict[str, Progress] = {}


@hookimpl
def ciphertune_sending_key(worker: str, nbytes: int, done: bool) -> None:
    """Show that a key is on its way, and for how long."""
    shown = _keys.pop(worker, None)
    if shown is not None:
        shown.stop()
    if done or _keys or _bar is not None or not _on_a_terminal():
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    line = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    line.add_task(f"sending a key of {nbytes / 1e6:.0f} MB to {worker}", total=None)
    _keys[worker] = line
    line.start()


# The bar of the session that prepares itself.
_preparing: tuple[Any, Progress, TaskID] | None = None

_FEWEST_CODES = 1 << 22
"""Preparation of fewer takes no time worth showing."""


@hookimpl
def ciphertune_preparing(session: Any, done: int, total: int) -> None:
    """Show how far the weights have been read."""
    global _preparing
    if _preparing is None:
        hidden = total < _FEWEST_CODES or _bar is not None or not _on_a_terminal()
        if hidden or done >= total:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("preparing encryption"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("of {task.fields[size]} million weights"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        _preparing = session, bar, bar.add_task("preparing", total=total, size=f"{total / 1e6:.0f}")
        bar.start()
    shown, bar, task = _preparing
    if shown is session:
        bar.update(task, completed=done)
        if done >= total:
            _end_preparing()


@hookimpl
def ciphertune_session_closed(session: Any) -> None:
    """Take away the bar of a preparation that was given up."""
    if _preparing is not None and _preparing[0] is session:
        _end_preparing()


def _end_preparing() -> None:
    global _preparing
    ended, _preparing = _preparing, None
    if ended is not None:
        ended[1].stop()


@hookimpl
def ciphertune_worker_excluded(worker: str, layers: tuple[str, ...], direction: str) -> None:
    """Print a line."""
    _say(f"wrong answer from {worker} for {' + '.join(layers)} ({direction}): it is asked no more")


@hookimpl
def ciphertune_before_request(exchange: Any) -> None:
    """Note the product that is waited for."""
    bar = _bar
    if bar is not None:
        name = ".".join(exchange.layers[0].split(".")[-3:])
        more = f" + {len(exchange.layers) - 1}" if len(exchange.layers) > 1 else ""
        evaluating = "" if bar.trainer.model.training else "evaluating: "
        bar.product = f"{evaluating}{name}{more} {exchange.direction}"


@hookimpl
def ciphertune_worker_silent(worker: str, problem: str, seconds: float) -> None:
    """Print a line, and show in the bar what is waited for."""
    if _bar is not None:
        _bar.silent[worker] = time.monotonic() + seconds
    problem = problem.removeprefix(f"{worker}: ")
    _say(f"{worker} does not answer ({problem}); waiting up to {seconds:.0f} s for it or a replica")


@hookimpl
def ciphertune_worker_back(worker: str, seconds: float) -> None:
    """Print a line."""
    if _bar is not None:
        _bar.silent.pop(worker, None)
    _say(f"{worker} answers again after {seconds:.0f} s")


def _say(line: str) -> None:
    """Print a line on standard error, above a bar that is there."""
    from rich.text import Text

    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    if _bar is not None:
        _bar.progress.console.print(Text(line))
    elif sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - what the plugin is for


@hookimpl
def ciphertune_training_start(trainer: Any, total_steps: int, start_step: int) -> None:
    """Show the bar."""
    global _bar
    _close()
    if _on_a_terminal():
        _bar = _Bar(trainer, total_steps, start_step)


@hookimpl
def ciphertune_training_step(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
    """Move it on."""
    if _bar is not None and _bar.trainer is trainer:
        _bar.update(step, metrics)


@hookimpl
def ciphertune_training_end(trainer: Any) -> None:
    """Close the bar."""
    if _bar is not None and _bar.trainer is trainer:
        _close()


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _close() -> None:
    global _bar
    bar, _bar = _bar, None
    if bar is not None:
        bar.close()
