"""Conformance suite of hook plugins."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ciphertune
from ciphertune import LoraTrainer, hookspecs
from ciphertune.plugins.checking import hooks_fault
from ciphertune.plugins.manager import PluginManager, adds_commands, anchored
from ciphertune.testing.transports import _resources, _until

_STEPS = 4


@dataclasses.dataclass
class Life:
    """Results of a session with a training run.

    Attributes:
        losses: of all steps.
        weights: those that were trained.
        random: states of the random generators at the end.
        alive: the trainer and the model, if something keeps them.
    """

    losses: list[float]
    weights: list[Tensor]
    random: list[Any]
    alive: list[weakref.ref[Any]]

    def same_as(self, other: Life) -> bool:
        """Return whether two runs ended in the same bits."""
        return (
            self.losses == other.losses
            and all(torch.equal(a, b) for a, b in zip(self.weights, other.weights, strict=True))
            and self.random == other.random
        )


class _StopError(Exception):
    """Ends a run that is to fail."""


def _network() -> nn.Sequential:
    """Trained layers around a frozen one, so that products go in both directions."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.25), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    network[3].requires_grad_(False)
    return network


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 12, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def live(
    plugins: PluginManager,
    checkpoints: Path | None = None,
    *,
    steps: int = _STEPS,
    resume: bool = False,
    stop: BaseException | None = None,
    outsourced: bool = True,
) -> Life:
    """Open a session, evaluate, train with evaluations, evaluate, close.

    Args:
        plugins: who looks on.
        checkpoints: where to write them; None for none.
        steps: optimizer steps of the whole run.
        resume: go on from the last checkpoint.
        stop: raised in the third step, and caught here: an interruption or an error.
        outsourced: train through a session, or in the clear.
    """
    random.seed(0)
    np.random.seed(0)
    model = _network()
    if outsourced:
        ciphertune.outsource(model, "clear", plugins=plugins)
    count = 0

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal count
        count += model.training
        if stop is not None and model.training and count == 3:
            raise stop
        return nn.functional.cross_entropy(outputs, targets)

    torch.manual_seed(2)
    data = TensorDataset(*_data())
    held = [tuple(_data())]
    loader: DataLoader[Any] = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    trainer = LoraTrainer(
        model,
        loss_fn=loss_of,
        learning_rate=0.05,
        steps=steps,
        eval_every=2,
        checkpoint_dir=checkpoints,
        checkpoint_every=None if checkpoints is None else 1,
        plugins=plugins,
        require_outsourced=outsourced,
        require_adapter=False,
    )
    trainer.evaluate(held)
    with contextlib.suppress(KeyboardInterrupt, _StopError):
        trainer.train(loader, held, resume=resume)
    trainer.evaluate(held)
    if outsourced:
        ciphertune.session_of(model).close()
    return Life(
        trainer.history.losses,
        [p.detach().clone() for p in model.parameters() if p.requires_grad],
        [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()],
        [weakref.ref(trainer), weakref.ref(model)],
    )


class PluginSuite:
    """For hook plugins that observe: inherit, set ``use`` or override ``plugin``, collect with pytest.

    Attributes:
        use: how the plugin is named, with its options; relative paths are put into the test's folder.
    """

    use: ClassVar[str]

    def plugin(self, folder: Path) -> Any:
        """A plugin; it may write into ``folder``. Called again for every run of the program that a test plays."""
        return PluginManager().use(anchored(self.use, folder))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Folder that the plugin may write to."""
        folder = tmp_path / "plugin"
        folder.mkdir()
        return folder

    @pytest.fixture
    def caught(self) -> Iterator[list[warnings.WarningMessage]]:
        """Every warning of a test."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught

    @staticmethod
    def _watched_by(plugin: Any) -> PluginManager:
        manager = PluginManager()
        manager.register(plugin, "tested")
        return manager

    @staticmethod
    def _close(plugin: Any) -> None:
        close = getattr(plugin, "close", None)
        if close is not None:
            close()

    @staticmethod
    def _failures(caught: list[warnings.WarningMessage]) -> list[str]:
        return [str(warning.message) for warning in caught if "'tested'" in str(warning.message)]

    def test_its_hooks_exist(self, folder: Path) -> None:
        """Every function named like a hook is one, and is marked as an implementation."""
        plugin = self.plugin(folder)
        fault = hooks_fault(plugin)
        assert fault is None, fault
        assert self._watched_by(plugin).names() == ["tested"]
        self._close(plugin)

    def test_it_says_which_hooks_it_is_written_for(self, folder: Path) -> None:
        """``interface`` is the version of the hooks that it was written for."""
        plugin = self.plugin(folder)
        self._close(plugin)
        stated = getattr(plugin, "interface", None)
        if stated is None:
            pytest.skip(f"it does not say: interface = {hookspecs.INTERFACE_VERSION}")
        assert stated == hookspecs.INTERFACE_VERSION

    def test_its_commands_can_be_added(self, folder: Path) -> None:
        """Commands are there without options, before any use of the plugin names them; none has a taken name."""
        plugin = self.plugin(folder)
        self._close(plugin)
        if not hasattr(plugin, "ciphertune_register_commands"):
            pytest.skip("it adds no commands")
        group = click.Group("ciphertune")
        if hasattr(type(plugin), "Options"):
            adds = adds_commands(type(plugin))
            assert adds is not None, (
                "ciphertune_register_commands needs an object, and commands are added before any options are given: "
                "make it a static method or a class method"
            )
            adds(cli=group)
        else:
            plugin.ciphertune_register_commands(cli=group)
        assert group.commands, "it added no command"
        assert all(command.help for command in group.commands.values()), "a command has no help"

    def test_training_is_as_it_is_without(self, folder: Path, caught: list[warnings.WarningMessage]) -> None:
        """Losses, weights and random states are equal bit for bit, twice with the same plugin, and in the clear."""
        plugin = self.plugin(folder)
        manager = self._watched_by(plugin)
        for outsourced in (True, True, False):
            alone = live(PluginManager(), outsourced=outsourced)
            watched = live(manager, outsourced=outsourced)
            assert len(alone.losses) == _STEPS
            assert watched.same_as(alone)
        self._close(plugin)
        assert self._failures(caught) == []

    @pytest.mark.parametrize("stop", [KeyboardInterrupt(), _StopError()], ids=["interrupted", "failed"])
    def test_a_run_that_stops_and_goes_on(
        self, stop: BaseException, folder: Path, tmp_path: Path, caught: list[warnings.WarningMessage]
    ) -> None:
        """A run that is interrupted and resumed, as if in another process, ends as one that never stopped."""
        alone = live(PluginManager())
        first = self.plugin(folder)
        stopped = live(self._watched_by(first), tmp_path / "checkpoints", stop=stop)
        assert stopped.losses == alone.losses[:2]
        self._close(first)
        second = self.plugin(folder)
        resumed = live(self._watched_by(second), tmp_path / "checkpoints", resume=True)
        assert resumed.losses == alone.losses
        assert all(torch.equal(a, b) for a, b in zip(resumed.weights, alone.weights, strict=True))
        self._close(second)
        assert self._failures(caught) == []

    def test_a_run_that_is_resumed_earlier_than_it_ended(
        self, folder: Path, tmp_path: Path, caught: list[warnings.WarningMessage]
    ) -> None:
        """A killed process may have seen steps that are done again."""
        live(PluginManager(), tmp_path / "checkpoints", steps=2)
        first = self.plugin(folder)
        live(self._watched_by(first))  # ends at step 4 without a checkpoint, and without being closed
        second = self.plugin(folder)
        resumed = live(self._watched_by(second), tmp_path / "checkpoints", resume=True)
        assert resumed.losses == live(PluginManager()).losses
        self._close(second)
        self._close(first)
        assert self._failures(caught) == []

    def test_requests_on_several_threads(self, folder: Path, caught: list[warnings.WarningMessage]) -> None:
        """Products of four threads at once, outside any training."""
        plugin = self.plugin(folder)
        model = ciphertune.outsource(_network(), "clear", layers="3", plugins=self._watched_by(plugin))
        session = ciphertune.session_of(model)
        wrong: list[BaseException] = []

        def run() -> None:
            try:
                for _ in range(25):
                    session.product(0, "forward", torch.randn(16, 16))
                    session.product(0, "backward", torch.randn(16, 16))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session.close()
        self._close(plugin)
        assert wrong == []
        assert session.traffic.requests == 200
        assert self._failures(caught) == []

    def test_one_that_comes_and_goes_in_the_middle(self, folder: Path, caught: list[warnings.WarningMessage]) -> None:
        """A plugin may be registered or removed in the middle of a run."""
        trainer = LoraTrainer(_network(), require_outsourced=False, require_adapter=False, plugins=PluginManager())
        metrics = {"step": 1, "epoch": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": 0.0}
        model = ciphertune.outsource(_network(), "clear")
        session = ciphertune.session_of(model)
        late = self.plugin(folder)
        manager = self._watched_by(late)
        manager.observe("ciphertune_training_step", trainer=trainer, step=1, metrics={**metrics, "tokens": 8})
        manager.observe("ciphertune_evaluation", trainer=trainer, step=1, metrics={"eval_loss": 1.0})
        manager.observe("ciphertune_training_end", trainer=trainer, step=1, reason="finished")
        manager.observe("ciphertune_session_closed", session=session)
        self._close(late)
        early = self.plugin(folder)
        manager = self._watched_by(early)
        for _ in range(2):  # the end of the first run is lost
            manager.observe("ciphertune_training_start", trainer=trainer, total_steps=3, start_step=0)
            for step in (1, 2):
                now = {**metrics, "step": step, "tokens": 8, "of_later_versions": 1.0}
                manager.observe("ciphertune_training_step", trainer=trainer, step=step, metrics=now)
            measured = {"eval_loss": 800.0, "perplexity": float("inf")}
            manager.observe("ciphertune_evaluation", trainer=trainer, step=2, metrics=measured)
        manager.unregister(early)
        self._close(early)
        self._close(early)
        session.close()
        assert self._failures(caught) == []

    def test_two_runs_at_once(self, folder: Path, caught: list[warnings.WarningMessage]) -> None:
        """Training goes on whatever the plugin makes of it; it may say that it records one run alone."""
        plugin = self.plugin(folder)
        manager = self._watched_by(plugin)
        alone = live(PluginManager())
        inner: list[Life] = []

        class Nested:
            outer = True

            @ciphertune.hookspecs.hookimpl
            def ciphertune_training_step(self, step: int) -> None:
                if step == 2 and self.outer:
                    self.outer = False
                    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
                    inner.append(live(manager))
                    random.setstate(state[0])
                    np.random.set_state(state[1])
                    torch.set_rng_state(state[2])

        manager.register(Nested(), "nested")
        assert live(manager).same_as(alone)
        assert inner[0].losses == alone.losses
        self._close(plugin)
        assert len(self._failures(caught)) <= 1

    def test_nothing_is_left_behind(self, folder: Path, caught: list[warnings.WarningMessage]) -> None:
        """Runs leave no threads, no open files, and no model."""
        used = self.plugin(folder)
        kept = live(self._watched_by(used))
        gc.collect()
        assert all(ref() is None for ref in kept.alive), "it keeps the trainer or the model"
        self._close(used)

        def once() -> None:
            plugin = self.plugin(folder)
            live(self._watched_by(plugin))
            self._close(plugin)

        once()
        gc.collect()
        threads, files = _resources()
        for _ in range(4):
            once()

        def settled() -> bool:
            gc.collect()
            now = _resources()
            return now[0] <= threads and now[1] <= files + 1

        assert _until(settled, 30), f"threads and files {(threads, files)} became {_resources()}"
        assert self._failures(caught) == []

    def test_it_is_silent_where_no_terminal_is(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Standard output belongs to the program; standard error is for people at a terminal."""
        capfd.readouterr()
        plugin = self.plugin(folder)
        live(self._watched_by(plugin))
        self._close(plugin)
        assert capfd.readouterr() == ("", "")

    def test_it_writes_no_data(self, folder: Path) -> None:
        """A smoke test: no number of the training data is in a file of the plugin, as text or as it is in memory."""
        plugin = self.plugin(folder)
        live(self._watched_by(plugin))
        self._close(plugin)
        values = _data()[0].flatten()
        needles = [values[n : n + 2].numpy().tobytes() for n in range(len(values) - 1)]
        needles += [f"{abs(value):.6f}".encode() for value in values.tolist()]
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not any(needle in content for needle in needles), f"{path.name} holds training data"
