"""Results of a run: the figures that every run has, and the files of its output folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ciphertune._support.atomic import replace_file
from ciphertune._support.locks import alone
from ciphertune.client.session import Session
from ciphertune.errors import ConfigError, TrainingError
from ciphertune.outsourcing.convert import Share
from ciphertune.report.costs import CostMeter, RunCosts
from ciphertune.report.loss_plot import plot_losses
from ciphertune.report.page import write_report

Progress = Callable[[str], None]
"""Function that is called with a line of text at every stage of a run."""


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """Paths of the results in a run's output folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def adapter(self) -> Path:
        """Directory of the adapter, as peft saves it."""
        return self.path / "adapter"

    @property
    def result(self) -> Path:
        """All figures as JSON."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The report, an HTML page."""
        return self.path / "report.html"

    @property
    def plot(self) -> Path:
        """Training loss over optimizer steps, a PNG."""
        return self.path / "loss.png"

    @contextlib.contextmanager
    def writing(self, checkpoints: Path | None, rescue: Callable[[Path], None] | None = None) -> Iterator[None]:
        """Let nothing be lost if results cannot be written, and say where the adapter is.

        Args:
            checkpoints: the run's folder of checkpoints.
            rescue: writes the adapter into the folder that it is given; called where there are no checkpoints. None
                once it is in the output.

        Raises:
            TrainingError: instead of ``OSError``.
        """
        try:
            yield
        except OSError as error:
            if checkpoints is not None:
                kept = "Make room and run it again with --resume: its last checkpoint is kept"
            elif rescue is None:
                kept = f"The adapter is in {self.adapter}"
            else:
                kept = _rescued(rescue)
            raise TrainingError(
                f"the training is done, but its results cannot be written to {self.path}: {error.strerror or error}. "
                f"{kept}"
            ) from error

    def write(self, content: Mapping[str, Any], curves: Mapping[str, Sequence[float]], title: str) -> None:
        """Write ``result.json``, the report and the plot, each with mode 0600, whole or not at all.

        Args:
            content: the figures, as ``ciphertune.report.page.render`` takes them.
            curves: for ``plot_losses``.
            title: of the plot.

        Raises:
            ConfigError: matplotlib is missing.
            OSError: a file cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(self.result, json.dumps(content, indent=2).encode())
        write_report(self.report, content)
        plot_losses(self.plot, curves, title)


def _rescued(save: Callable[[Path], None]) -> str:
    """Save an adapter where there may be room, and say where."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="ciphertune-adapter-"))
        save(folder / "adapter")
    except OSError:
        return "There is no room for the adapter anywhere. With checkpoint_dir set, a run can be finished later"
    return f"The adapter is in {folder / 'adapter'}: move it to where it is to stay"


@contextlib.contextmanager
def writable(name: str, folder: Path) -> Iterator[None]:
    """Make a folder for results, or say now rather than after the training that it cannot be, and hold it.

    Args:
        name: of the setting that names the folder, for the message.
        folder: made if missing. Others are kept out within the ``with`` block.

    Raises:
        ConfigError: it cannot be made or written to, or another run is writing to it.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"x")
            free = held.enter_context(alone(folder))
        except OSError as error:
            raise ConfigError(f"{name}: cannot write to {folder}: {error.strerror}") from error
        if not free:
            raise ConfigError(f"{name}: another run is writing to {folder}: let it end first, or name another folder")
        yield


@dataclasses.dataclass(kw_only=True)
class Result:
    """The figures that every run has; ``result.json`` holds the same.

    Attributes:
        to: selection string.
        traffic: totals of the run: requests, bytes and seconds by phase.
        outsourced_fraction: share of the model's weights that were at the workers.
        security: the backend's statement.
        security_bits: None where nothing is encrypted.
        security_level: the same in words, by cost model where several are known.
        checked: how answers were held against what was asked for; see ``Session.checked``.
        excluded: workers that gave wrong answers in this run, and when, on which layers.
        costs: cost of the run by phase and layer.
        adapter, report, plot: paths of the files written.
    """

    to: str
    traffic: dict[str, Any]
    outsourced_fraction: float
    security: str
    security_bits: float | None
    security_level: str
    checked: str
    excluded: list[dict[str, str]]
    costs: RunCosts
    adapter: str
    report: str
    plot: str


def common_figures(to: str, session: Session, share: Share, meter: CostMeter, output: OutputFolder) -> dict[str, Any]:
    """The attributes of ``Result`` by name, at the end of a run."""
    return {
        "to": to,
        "traffic": dataclasses.asdict(session.traffic),
        "outsourced_fraction": share.fraction,
        "security": session.security.summary,
        "security_bits": session.security.bits,
        "security_level": session.security.level,
        "checked": session.checked,
        "excluded": [{"worker": each.worker, "when": each.when, "why": each.why} for each in session.pool.wrong],
        "costs": meter.costs(),
        "adapter": str(output.adapter),
        "report": str(output.report),
        "plot": str(output.plot),
    }
