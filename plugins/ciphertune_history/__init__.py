"""A run's history in a file: one row for every optimizer step and every evaluation, written at once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ciphertune import PluginError, SelectionError
from ciphertune.tracker import Tracker

COLUMNS = (
    *("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "seconds", "tokens", "samples"),
    *("eval_loss", "perplexity", *Tracker.COUNTS, "time"),
)
"""Of CSV files, in this order in every version; later ones come after these."""


@dataclasses.dataclass(frozen=True)
class HistoryOptions:
    """Options of the history plugin.

    Attributes:
        path: the file, whose suffix is ``.csv`` (``COLUMNS``, empty where there is no value) or ``.jsonl`` (an object a
            line, with whatever metrics there are; null for infinity). A run that resumes goes on with it, any other
            begins it anew.
    """

    path: Path

    def __post_init__(self) -> None:
        if self.path.suffix not in (".csv", ".jsonl"):
            raise SelectionError(f"option path={str(self.path)!r} must end in .csv or .jsonl")


class History(Tracker):
    """Writes the file, with mode 0600; metrics and times alone, never data.

    Raises:
        PluginError: the path is there already and is no history, so that it must not be written over.
    """

    interface = 1
    Options = HistoryOptions

    def __init__(self, options: HistoryOptions) -> None:
        super().__init__()
        self.path = options.path
        self._csv = options.path.suffix == ".csv"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent) as probe:
                probe.write(b"x")
            with self.path.open("rb") as stream:
                first = stream.readline(1 << 16)
        except FileNotFoundError as error:
            if not self.path.parent.is_dir():
                raise PluginError(f"cannot write {self.path}: {error.strerror}") from error
            return
        except OSError as error:
            raise PluginError(f"cannot use {self.path}: {error.strerror}") from error
        if first and not (first == self._line(COLUMNS) if self._csv else _row(first) is not None):
            raise PluginError(f"{self.path} is there already and is not a history: choose another path")

    def begin(self, trainer: Any, total_steps: int, start_step: int) -> None:
        """Begin the file, or drop what will be done again and what an interruption left half written."""
        from ciphertune._support.atomic import replace_file

        lines = [self._line(COLUMNS)] if self._csv else []
        if start_step > 0 and self.path.exists():
            lines += self._kept(self.path.read_bytes(), start_step)
        replace_file(self.path, b"".join(lines))

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row, whole or not at all."""
        row: dict[str, Any] = {"kind": kind, **metrics, "step": step, "time": round(time.time(), 3)}
        if self._csv:
            line = self._line([row.get(name, "") for name in COLUMNS])
        else:
            finite = {name: v if not isinstance(v, float) or math.isfinite(v) else None for name, v in row.items()}
            line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(file).st_size
            try:
                if os.write(file, line) != len(line):
                    raise OSError("the disk is full")
            except BaseException:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    def _line(self, cells: Any) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()

    def _kept(self, content: bytes, start_step: int) -> Iterator[bytes]:
        """Whole lines of steps up to ``start_step``."""
        for line in content.splitlines(keepends=True):
            step = self._step(line) if line.endswith(b"\n") else None
            if step is not None and step <= start_step:
                yield line

    def _step(self, line: bytes) -> int | None:
        if not self._csv:
            row = _row(line)
            return None if row is None else row["step"]
        cells = next(csv.reader([line.decode(errors="replace")]), [])
        step = cells[1] if len(cells) == len(COLUMNS) else ""
        return int(step) if step.isascii() and step.isdigit() else None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and "kind" in row else None
