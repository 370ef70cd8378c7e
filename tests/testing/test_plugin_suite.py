"""The built-in hook plugins pass the suite that plugins are given, and what is broken does not."""

from __future__ import annotations

import inspect
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ciphertune.hookspecs import hookimpl
from ciphertune.testing import PluginSuite


class TestProgress(PluginSuite):
    use = "progress"


class TestTraffic(PluginSuite):
    use = "traffic"


class TestTrafficFile(PluginSuite):
    use = "traffic?path=traffic.json"


class TestHistoryCsv(PluginSuite):
    use = "history?path=run/history.csv"


class TestHistoryJsonl(PluginSuite):
    use = "history?path=history.jsonl"


class TestTensorBoard(PluginSuite):
    use = "tensorboard?folder=run"


class TestPrometheus(PluginSuite):
    use = "prometheus?port=0"


@pytest.mark.slow
class TestMLflow(PluginSuite):
    @pytest.fixture(autouse=True)
    def _store(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setattr(type(self), "use", f"mlflow?uri={(tmp_path / 'plugin' / 'store').as_uri()}", raising=False)


class Base:
    """Does nothing, and passes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def ciphertune_training_step(self, trainer: Any, step: int) -> None: ...


class TestAPluginWithoutOptions(PluginSuite):
    def plugin(self, folder: Path) -> Base:
        return Base(folder)


class Misspelt(Base):
    @hookimpl
    def ciphertune_trainig_end(self) -> None: ...


class Unmarked(Base):
    def ciphertune_training_end(self) -> None: ...


class Draws(Base):
    @hookimpl
    def ciphertune_training_step(self) -> None:
        torch.rand(1)


class DrawsFromPython(Base):
    @hookimpl
    def ciphertune_after_reply(self) -> None:
        random.random()


class Meddles(Base):
    @hookimpl
    def ciphertune_evaluation(self, trainer: Any) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).add_(1e-6)


class Raises(Base):
    @hookimpl
    def ciphertune_training_end(self, reason: str) -> None:
        if reason == "interrupted":
            raise ValueError("unforeseen")


class CountsOnBeginnings(Base):
    @hookimpl
    def ciphertune_training_start(self) -> None:
        self.losses: list[float] = []

    @hookimpl
    def ciphertune_training_step(self, metrics: Any) -> None:
        self.losses.append(metrics["loss"])


class Races(Base):
    busy = 0

    @hookimpl
    def ciphertune_after_reply(self) -> None:
        self.busy += 1
        threading.Event().wait(0.001)
        if self.busy != 1:
            self.busy = 0
            raise RuntimeError("two at once")
        self.busy = 0


class Keeps(Base):
    @hookimpl
    def ciphertune_training_start(self, trainer: Any) -> None:
        self.trainer = trainer


class LeavesThreads(Base):
    @hookimpl
    def ciphertune_training_start(self) -> None:
        stop = threading.Event()
        threading.Thread(target=stop.wait, args=(20,), daemon=True).start()


class LeavesFiles(Base):
    kept: list[Any] = []  # noqa: RUF012

    @hookimpl
    def ciphertune_training_start(self) -> None:
        self.kept.append((self.folder / "log").open("ab"))


class Talks(Base):
    @hookimpl
    def ciphertune_training_end(self, reason: str) -> None:
        print(reason)  # noqa: T201


class Tells(Base):
    @hookimpl
    def ciphertune_training_start(self, trainer: Any) -> None:
        from ciphertune.testing.plugins import _data

        (self.folder / "batch.txt").write_text(str([f"{x:.8f}" for x in _data()[0][0].tolist()]))


@pytest.mark.parametrize(
    ("plugin", "test"),
    [
        (Misspelt, "test_its_hooks_exist"),
        (Unmarked, "test_its_hooks_exist"),
        (Draws, "test_training_is_as_it_is_without"),
        (DrawsFromPython, "test_training_is_as_it_is_without"),
        (Meddles, "test_training_is_as_it_is_without"),
        (Raises, "test_a_run_that_stops_and_goes_on"),
        (CountsOnBeginnings, "test_one_that_comes_and_goes_in_the_middle"),
        (Races, "test_requests_on_several_threads"),
        (Keeps, "test_nothing_is_left_behind"),
        (LeavesThreads, "test_nothing_is_left_behind"),
        (LeavesFiles, "test_nothing_is_left_behind"),
        (Talks, "test_it_is_silent_where_no_terminal_is"),
        (Tells, "test_it_writes_no_data"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_is_broken_does_not_pass(
    plugin: type[Base], test: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciphertune.testing.plugins._until", lambda condition, seconds: condition())
    folder = tmp_path / "plugin"
    folder.mkdir()
    suite = type("Suite", (PluginSuite,), {"plugin": lambda self, folder: plugin(folder)})()
    method = getattr(suite, test)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments = {
            "folder": folder,
            "tmp_path": tmp_path,
            "caught": caught,
            "capfd": capfd,
            "stop": KeyboardInterrupt(),
        }
        wanted = inspect.signature(method).parameters
        with pytest.raises(AssertionError):
            method(**{name: arguments[name] for name in wanted})
    for stream in LeavesFiles.kept:
        stream.close()
    LeavesFiles.kept.clear()
