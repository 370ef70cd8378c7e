"""Training curves for TensorBoard."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ciphertune import PluginError
from ciphertune.tracker import Tracker

_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class TensorBoardOptions:
    """Options of the tensorboard plugin.

    Attributes:
        folder: of this run, below the folder that TensorBoard is started on. TensorBoard shows one run in a folder: of
            those before, it forgets the steps that the latest one does again.
    """

    folder: Path


class TensorBoard(Tracker):
    """Writes scalars, and nothing but scalars, to event files. Every step is on the disk when the next one begins.

    Raises:
        PluginError: tensorboardX is missing.
    """

    interface = 1
    Options = TensorBoardOptions

    def __init__(self, options: TensorBoardOptions) -> None:
        super().__init__()
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise PluginError('needs tensorboardX: pip install "ciphertune[tensorboard]"') from error
        self.folder = options.folder
        self._writer: Any = None

    def begin(self, trainer: Any, total_steps: int, start_step: int) -> None:
        """A file of events, which makes TensorBoard forget those of steps that will be done again."""
        self.close()
        self._open()
        self._write(start_step + 1, session_log={"status": "START"})

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add a step's scalars, under ``train/`` and ``traffic/``, or an evaluation's, under ``eval/``."""
        values: dict[str, float] = {}
        if kind == "step":
            values = {f"train/{n}": metrics[n] for n in ("loss", "learning_rate", "grad_norm", "seconds")}
            unit = "tokens" if "tokens" in metrics else "samples"
            if unit in metrics and metrics["seconds"] > 0:
                values[f"train/{unit}_per_second"] = metrics[unit] / metrics["seconds"]
            values |= {f"traffic/{n}": metrics[n] for n in ("bytes_up", "bytes_down", "retries")}
        else:
            known = ("eval_loss", "perplexity", "eval_accuracy", "eval_f1")
            values = {f"eval/{n.removeprefix('eval_')}": metrics[n] for n in known if n in metrics}
        ended = self._writer is None  # an evaluation after the run
        if ended:
            self._open()
        self._write(step, summary={"value": [{"tag": t, "simple_value": float(v)} for t, v in values.items()]})
        if ended:
            self.close()

    def end(self, step: int, reason: str) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file, if one is open."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self) -> None:
        # Not SummaryWriter: it keeps every scalar in memory, and a thread that writes them some time later.
        from tensorboardX.event_file_writer import EventsWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        # Files of the same second would have the same name.
        self._writer = EventsWriter(str(self.folder / "events"), f".{os.getpid()}.{next(_numbers)}")

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()
