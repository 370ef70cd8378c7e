"""The state of a training run in checkpoints: stored, checked against a run, and restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ciphertune._support.atomic import remove_drafts
from ciphertune._support.torch_compat import scheduler_state
from ciphertune.errors import CheckpointError
from ciphertune.training import adapter, codec, rng
from ciphertune.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune,
    read_checkpoint,
    unusable,
    write_checkpoint,
)
from ciphertune.training.history import History
from ciphertune.training.loader import ResumableLoader
from ciphertune.training.ranks import check_ranks, ranks_state, restore_ranks
from ciphertune.training.rescheduling import ScheduleError, continued

_TOTAL = "total steps"


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """The point from which a resumed run goes on.

    Attributes:
        step: optimizer steps done.
        history: their metrics.
        random_states: those to go on with, for ``ResumableLoader.restore``.
    """

    step: int
    history: History
    random_states: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunState:
    """The parts of a run whose state a checkpoint holds.

    Attributes:
        model: its trainable parameters and persistent buffers are stored (running statistics change in training).
        optimizer: stored with the names of its parameters.
        scheduler: None where the learning rate is constant.
        loader: stored by its position.
        total_steps: optimizer steps to train for.
        settings: further settings that a resumed run must share with the run it resumes, by name.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    loader: ResumableLoader
    total_steps: int
    settings: Mapping[str, Any]

    def check_fresh(self, directory: Path) -> None:
        """Check that a new run can write its checkpoints to a directory; remove what a killed process left there.

        Raises:
            CheckpointError: the directory holds checkpoints, or the optimizer's or the scheduler's state cannot be
                stored.
        """
        present = list_checkpoints(directory)
        if present:
            raise CheckpointError(
                f"{directory} already holds {present[-1].name}: resume it (resume=True, or --resume on the command "
                "line), or choose another checkpoint_dir"
            )
        remove_drafts(directory)
        for name, state in self._optimization().items():
            codec.encode(state, {}, name)

    def save(self, directory: Path, step: int, history: History, keep: int | None) -> None:
        """Write a checkpoint and remove all but the ``keep`` latest; None keeps all.

        Raises:
            CheckpointError: it cannot be written.
        """
        state = {
            "settings": {**self._compared(), _TOTAL: self.total_steps},
            "position": self.loader.state(),
            "history": dataclasses.asdict(history),
            "parameters": self._parameter_names(),
            "ranks": ranks_state(self.model),
            **self._optimization(),
        }
        tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in _live_tensors(self.model).items()}
        save = (lambda path: adapter.save(self.model, path)) if adapter.is_peft(self.model) else None
        with rng.preserved():  # an uninterrupted run must go on exactly as a resumed one does
            write_checkpoint(directory, Checkpoint(step, tensors, state), save)
        prune(directory, keep)

    def resume(self, directory: Path) -> ResumePoint:
        """Restore the latest checkpoint in a directory. On error nothing is changed.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is of another run.
        """
        present = list_checkpoints(directory)
        if not present:
            raise CheckpointError(
                f"there is no checkpoint in {directory}: begin without resuming (resume=False, or without --resume on "
                "the command line)"
            )
        path = present[-1]
        checkpoint = read_checkpoint(path)
        self._check(path, checkpoint)
        position, history = checkpoint.state["position"], checkpoint.state["history"]
        scheduled = self._schedule(path, checkpoint)
        before = self.loader.capture()
        try:
            self.loader.resume(position)
        except BaseException:
            self.loader.restore(before)
            raise
        with torch.no_grad():
            for name, tensor in _live_tensors(self.model).items():
                tensor.copy_(checkpoint.trainable[name])
        restore_ranks(self.model, checkpoint.state.get("ranks"))
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduled)
        remove_drafts(directory)
        done = History(**history)
        return ResumePoint(checkpoint.step, done, position["now"])

    def _compared(self) -> dict[str, Any]:
        """All that a checkpoint's run and this one must have in common, by name."""
        return {
            **self.settings,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "batches per epoch": self.loader.length,
        }

    def _schedule(self, path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
        """The state that the scheduler goes on with, for as many steps as there are now.

        Raises:
            CheckpointError: over another number of steps its learning rates would have been others.
        """
        stored: dict[str, Any] = checkpoint.state["scheduler"]
        before = checkpoint.state["settings"].get(_TOTAL)
        if self.scheduler is None or before in (None, self.total_steps):
            return stored
        rates = [entry["learning_rate"] for entry in checkpoint.state["history"]["steps"]]
        following = [group["lr"] for group in checkpoint.state["optimizer"]["param_groups"]]
        try:
            return continued(self.scheduler, self.optimizer, rates, stored, following, self.total_steps)
        except ScheduleError as error:
            raise CheckpointError(
                f"{path} is of a run of {before} steps, and the learning rates of {type(self.scheduler).__name__} do "
                f"not go on to {self.total_steps}: {error}. Nothing was changed. Resume with the epochs or steps that "
                "it had; to train longer, load the adapter that it ends with, and begin a run of its own in another "
                "checkpoint_dir. Schedules that do not depend on the length of a run can go on: constant ones, "
                "warming up for a number of steps, StepLR"
            ) from error

    def _optimization(self) -> dict[str, Any]:
        """The state dicts of optimizer and scheduler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else scheduler_state(self.scheduler),
        }

    def _parameter_names(self) -> list[list[str]]:
        """The parameters' names by group of the optimizer; empty for a tensor that is not in the model."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [[names.get(id(p), "") for p in group["params"]] for group in self.optimizer.param_groups]

    def _check(self, path: Path, checkpoint: Checkpoint) -> None:
        """Check that a checkpoint fits this run, changing nothing.

        Raises:
            CheckpointError: it is of another model, data or settings, goes beyond this run, or its content makes no
                sense.
        """
        _check_tensors(path / "trainable.safetensors", checkpoint.trainable, _live_tensors(self.model))
        state, file = checkpoint.state, path / "state.json"
        settings = self._compared()
        try:
            stored = dict(state["settings"])
            stored.pop(_TOTAL, None)
            differing = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
        except (KeyError, TypeError, ValueError) as error:
            raise unusable(file, error) from error
        if differing:
            listed = "; ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in differing)
            raise CheckpointError(
                f"{path} belongs to another run: {listed}. Train with what it was, or begin anew in another "
                "checkpoint_dir"
            )
        try:
            self.loader.check(state["position"])
            _check_history(state["history"], checkpoint.step)
            if state["parameters"] != self._parameter_names():
                raise CheckpointError(
                    f"{file} does not fit the optimizer: it held other parameters, or in another order. Nothing was "
                    "changed. Make model and optimizer as they were, or begin anew in another checkpoint_dir"
                )
            _check_optimizer(state["optimizer"], self.optimizer)
            check_ranks(self.model, state.get("ranks"))
            if self.scheduler is not None and not isinstance(state["scheduler"], dict):
                raise TypeError("the scheduler state is no object")
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise unusable(file, error) from error
        if checkpoint.step > self.total_steps:
            raise CheckpointError(f"{path} is beyond the {self.total_steps} steps to train for: raise epochs or steps")


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and persistent buffers of a model, by name."""
    kept: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                kept[name] = buffer
    return kept


def _check_tensors(file: Path, stored: dict[str, Tensor], live: dict[str, Tensor]) -> None:
    differing = [f"{name} is missing" for name in live.keys() - stored.keys()]
    differing += [f"{name} is not in the model or not trainable" for name in stored.keys() - live.keys()]
    for name in live.keys() & stored.keys():
        was, now = stored[name], live[name]
        if was.shape != now.shape or was.dtype != now.dtype:
            differing.append(f"{name} was {tuple(was.shape)} {was.dtype} and is {tuple(now.shape)} {now.dtype}")
    if differing:
        listed = "; ".join(sorted(differing)[:3])
        raise CheckpointError(
            f"{file} does not fit the model in {len(differing)} places: {listed}. Nothing was changed. "
            "Build the model and its adapter as they were, or begin anew in another checkpoint_dir"
        )


def _check_optimizer(stored: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise an error for a state that ``optimizer`` cannot load, with nothing loaded."""
    current = optimizer.state_dict()
    for was, now in zip(stored["param_groups"], current["param_groups"], strict=True):
        if was.keys() != now.keys() or was["params"] != now["params"]:
            raise ValueError(f"the optimizer's options differ: {sorted(was.keys() ^ now.keys())}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in stored["state"].items():
        shape = parameters[index].shape
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() == len(shape) and value.shape != shape:
                raise ValueError(f"the optimizer's {name} of parameter {index} has shape {tuple(value.shape)}")


def _check_history(history: dict[str, Any], step: int) -> None:
    for kind in ("steps", "evaluations"):
        for entry in history[kind]:
            if not all(isinstance(k, str) and isinstance(v, (int, float)) for k, v in entry.items()):
                raise TypeError(f"the history's {kind} are no metrics")
    for name, norms in history.get("gradient_norms", {}).items():
        if not isinstance(name, str) or not all(isinstance(norm, (int, float)) for norm in norms):
            raise TypeError("the history's gradient norms are no numbers")
    if not history.keys() <= {field.name for field in dataclasses.fields(History)}:
        raise ValueError("the history holds more than this version knows")
    if len(history["steps"]) != step:
        raise ValueError(f"the history has {len(history['steps'])} steps of {step}")
