"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ciphertune._support.atomic import remove_drafts
from ciphertune.errors import (
    CheckpointError,
    NoAdapterError,
    NonFiniteLossError,
    NothingOutsourcedError,
    TrainingError,
)
from ciphertune.interleaving.interleaver import Interleaver
from ciphertune.outsourcing.convert import outsourced_layers
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.training import accumulate, adapter, batches, resume, rng
from ciphertune.training.checkpoint import Checkpoint, list_checkpoints, prune, read_checkpoint, write_checkpoint
from ciphertune.training.history import History
from ciphertune.training.inference import InferenceModel, evaluating
from ciphertune.training.reader import Reader

OptimizerChoice = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
SchedulerChoice = LRScheduler | Callable[[Optimizer, int], LRScheduler] | None


class LoraTrainer:
    """Trains the trainable parameters of a model, which are its adapters' as a rule.

    Batches are mappings of model arguments (dict, ``BatchEncoding``) or tuples ``(inputs…, targets)``. The model's
    weights change only in whole, finite optimizer steps.

    Args:
        model: any module with trainable parameters.
        optimizer: None for AdamW over the trainable parameters, an optimizer, or a function that makes one from them.
        loss_fn: called as ``loss_fn(outputs, targets)`` for tuple batches and ``loss_fn(outputs, batch)`` for
            mappings, giving a scalar; None to use the ``loss`` that the model returns for mappings.
        scheduler: None for a constant learning rate, a scheduler of ``optimizer``, or a function of the optimizer and
            the total number of optimizer steps that makes one. It steps once per optimizer step.
        learning_rate, weight_decay: of the optimizer that is made when none is given.
        epochs: passes over the data.
        max_steps: optimizer steps to train for, however many epochs that takes; decides instead of ``epochs``.
        accumulation: micro-batches per optimizer step, each with the same weight. The last step of an epoch averages
            over the micro-batches that are left.
        interleave: how many of them are under way at once, from 1 to ``accumulation``: while one waits for a worker,
            another is computed. Losses and gradients are the same but for dropout, where each micro-batch draws
            from a stream of its own. Memory grows with it, as with larger batches.
        max_grad_norm: gradients are scaled down to this Euclidean norm; None to leave them.
        eval_every: optimizer steps between evaluations; by default at each epoch's end, where there is ``eval_data``.
        checkpoint_dir: where to write checkpoints; None for none.
        checkpoint_every: optimizer steps between checkpoints; by default at each epoch's end. The end of training
            always has one.
        keep_checkpoints: how many of the latest to keep; None for all.
        device: where to move the model; by default it stays, and batches go to its first parameter's device.
        plugins: hook plugins; those of the process unless given.
        require_outsourced: refuse a model without outsourced layers; set to False for a comparison run in the clear.
        allow_unused: allow trainable parameters that the loss does not depend on.

    Attributes:
        history: metrics of the current or last run.
        step: optimizer steps done in it.
        optimizer: the optimizer.
        scheduler: the scheduler; None before training where a function makes it, or where there is none.

    Raises:
        NoAdapterError: the model has no trainable parameter.
        NothingOutsourcedError: the model has no outsourced layer and ``require_outsourced`` is set.
        TrainingError: an argument is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerChoice = None,
        loss_fn: batches.LossFunction | None = None,
        scheduler: SchedulerChoice = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        epochs: int = 1,
        max_steps: int | None = None,
        accumulation: int = 1,
        interleave: int = 1,
        max_grad_norm: float | None = 1.0,
        eval_every: int | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int | None = 2,
        device: str | torch.device | None = None,
        plugins: PluginManager | None = None,
        require_outsourced: bool = True,
        allow_unused: bool = False,
    ) -> None:
        counts = {
            "epochs": epochs,
            "max_steps": max_steps,
            "accumulation": accumulation,
            "interleave": interleave,
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "keep_checkpoints": keep_checkpoints,
        }
        for name, value in counts.items():
            optional = name not in ("epochs", "accumulation", "interleave")
            if not (value is None and optional) and (type(value) is not int or value < 1):
                raise TrainingError(f"{name} must be a whole number from 1{' or None' * optional}, not {value!r}")
        if interleave > accumulation:
            raise TrainingError(
                f"interleave must be from 1 to accumulation, which is {accumulation}, not {interleave}: a step has "
                "no more micro-batches"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise TrainingError(f"max_grad_norm must be above 0, or None for no clipping; got {max_grad_norm!r}")
        if checkpoint_every is not None and checkpoint_dir is None:
            raise TrainingError("checkpoint_every is set but checkpoint_dir is not: say where to write checkpoints")
        self.model = model
        self.loss_fn = loss_fn
        self.epochs = epochs
        self.max_steps = max_steps
        self.accumulation = accumulation
        self.interleave = interleave
        self.max_grad_norm = max_grad_norm
        self.eval_every = eval_every
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.plugins = plugins if plugins is not None else plugin_manager()
        self.allow_unused = allow_unused
        self.history = History()
        self.step = 0
        trainable = list(self._trainable().values())
        if require_outsourced and not outsourced_layers(model):
            raise NothingOutsourcedError(
                "the model has no outsourced layer: call ciphertune.outsource(model, to=…) first, "
                "or say require_outsourced=False to train in the clear"
            )
        if device is not None:
            model.to(device)
        self._interleaver: Interleaver | None = None  # while training
        self._settings: dict[str, Any] = {"accumulation": accumulation, "max_grad_norm": max_grad_norm}
        if interleave > 1:  # which dropout draws differently
            self._settings["interleave"] = interleave
        if optimizer is None:
            self._settings |= {"learning_rate": learning_rate, "weight_decay": weight_decay}
            optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
        elif not isinstance(optimizer, Optimizer):
            optimizer = optimizer(trainable)
        if not isinstance(optimizer, Optimizer):
            raise TrainingError(
                f"optimizer must be or make a torch optimizer, but this is a {type(optimizer).__name__}"
            )
        self.optimizer: Optimizer = optimizer
        self._make_scheduler = None if isinstance(scheduler, LRScheduler) else scheduler
        self.scheduler = scheduler if isinstance(scheduler, LRScheduler) else None
        self._check_scheduler()
        self._check_optimizer()

    @property
    def inference_model(self) -> InferenceModel:
        """The model for inference only, adapters on: evaluation mode and no gradients during each call."""
        return InferenceModel(self.model)

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model computes without its adapters, as with peft's ``disable_adapter``.

        Raises:
            NoAdapterError: the model is not a peft model.
        """
        return adapter.disabled(self.model)

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter as peft does, to load on the original model; no file is ever half written.

        Args:
            path: a directory, made if missing; its other files are kept.

        Raises:
            NoAdapterError: the model is not a peft model.
        """
        adapter.save(self.model, Path(path))

    def train(self, data: Iterable[Any], eval_data: Iterable[Any] | None = None, *, resume: bool = False) -> History:
        """Train, or go on from the latest checkpoint exactly as if training had never stopped.

        Args:
            data: a DataLoader, a list of batches, or anything that gives them anew each time it is iterated.
                Without a length, ``max_steps`` is needed.
            eval_data: the same, for evaluations.
            resume: go on from the latest checkpoint of ``checkpoint_dir``. Model, data and settings must be as they
                were; ``epochs`` and ``max_steps`` may grow where there is no scheduler.

        Returns:
            The history of the whole run, resumed parts included.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite. The weights are those of the step before.
            CheckpointError: a checkpoint cannot be written, read, or does not fit this run.
            TrainingError: the data or a batch cannot be trained on, or a trainable parameter gets no gradient.
            InputError, TransportError, WorkerError: a product could not be had; see ``ciphertune.outsource``.
        """
        batches.check_data(data, "data")
        if eval_data is not None:
            batches.check_data(eval_data, "eval_data")
        elif self.eval_every is not None:
            raise TrainingError("eval_every is set but there is no eval_data")
        reader = Reader(data, self.accumulation)
        total = self._total_steps(reader)
        self._check_optimizer()
        if self._make_scheduler is not None:
            self.scheduler = self._make_scheduler(self.optimizer, total)
            self._check_scheduler()
        start = self._load(reader, total) if resume else None
        if start is None:
            self._check_fresh()
            self.step, self.history = 0, History()
        self.optimizer.zero_grad()
        self.model.train()
        reason = "failed"
        try:
            self.plugins.observe("ciphertune_training_start", trainer=self, total_steps=total, start_step=self.step)
            if start is not None:
                reader.restore(start)
            with self._interleaving():
                self._run(reader, total, eval_data)
            reason = "finished"
        except (KeyboardInterrupt, SystemExit):
            reason = "interrupted"
            raise
        finally:
            self.optimizer.zero_grad()
            self.plugins.observe("ciphertune_training_end", trainer=self, step=self.step, reason=reason)
        return self.history

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """The mean loss over data, in evaluation mode; modes and random states are left as they were.

        Args:
            data: batches as for training.

        Returns:
            ``eval_loss``, every target counting the same (labels other than -100, as the model's loss counts them;
            samples, where targets are not class indices), and ``perplexity`` for a language model with its own loss.

        Raises:
            NonFiniteLossError: a batch's loss is NaN or infinite.
            TrainingError: there is no target in the data, or a batch has the wrong form.
        """
        total, weight, of_model = 0.0, 0, self.loss_fn is None
        device = self._device()
        with rng.preserved(), evaluating(self.model):
            for index, batch in enumerate(data):
                outcome = batches.run(self.model, batch, self.loss_fn, device)
                if outcome.weight == 0:  # a mean over no target is NaN by definition
                    continue
                loss = float(outcome.loss)
                if not math.isfinite(loss):
                    raise NonFiniteLossError(f"evaluation: the loss of batch {index + 1} is {loss}")
                total += loss * outcome.weight
                weight += outcome.weight
        if weight == 0:
            raise TrainingError("the evaluation data has no batch, or no label other than -100 in any batch")
        metrics = {"eval_loss": total / weight}
        if of_model and batches.language_model(self.model) is not None:
            mean = metrics["eval_loss"]
            metrics["perplexity"] = math.exp(mean) if mean < 709 else math.inf
        self.plugins.observe("ciphertune_evaluation", trainer=self, step=self.step, metrics=dict(metrics))
        return metrics

    @contextlib.contextmanager
    def _interleaving(self) -> Iterator[None]:
        """Threads for micro-batches, where more than one is to be under way."""
        if self.interleave == 1:
            yield
            return
        accumulate.refuse_hooks(self._trainable())
        with Interleaver(self.interleave) as self._interleaver:
            try:
                yield
            finally:
                self._interleaver = None

    def _run(self, reader: Reader, total: int, eval_data: Iterable[Any] | None) -> None:
        first = True
        while self.step < total:
            metrics = self._train_step(reader, first)
            first = False
            self.history.steps.append(metrics)
            self.plugins.observe("ciphertune_training_step", trainer=self, step=self.step, metrics=dict(metrics))
            done = self.step == total
            if eval_data is not None and self._due(self.eval_every, reader, done):
                self.history.evaluations.append({"step": self.step, **self.evaluate(eval_data)})
            if self.checkpoint_dir is not None and (done or self._due(self.checkpoint_every, reader, done)):
                self._save(self.checkpoint_dir, reader, total)

    def _due(self, every: int | None, reader: Reader, done: bool) -> bool:
        return self.step % every == 0 if every is not None else reader.epoch_complete or done

    def _train_step(self, reader: Reader, first: bool) -> dict[str, float]:
        """One optimizer step; on any error before its end, weights and optimizer state are untouched."""
        begin = time.perf_counter()
        group = reader.next()
        where = f"step {self.step + 1} (epoch {reader.epoch})"
        loss = self._accumulate(group, where)
        trainable = self._trainable()
        if first and not self.allow_unused:
            _check_gradients(trainable)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(list(trainable.values()), limit))
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"{where}: the loss is {loss:.4g} but the norm of its gradient is {norm}; no weight was touched. "
                "Lower the learning rate, or look for an overflow in the model"
            )
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        unit = batches.size(group[0])[0]
        return {
            "step": self.step,
            "epoch": reader.epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "seconds": time.perf_counter() - begin,
            unit: sum(batches.size(batch)[1] for batch in group),
        }

    def _accumulate(self, group: list[Any], where: str) -> float:
        """Gradients of the mean loss of the micro-batches; returns that mean."""
        numbers = range(1, len(group) + 1)
        tasks = [
            functools.partial(self._micro_batch, batch, len(group), f"{where}: the loss of micro-batch {number}")
            for number, batch in zip(numbers, group, strict=True)
        ]
        total = 0.0
        for loss in accumulate.run(tasks, self._trainable().values(), self._interleaver):
            total += loss
        return total / len(group)

    def _micro_batch(self, batch: Any, count: int, what: str) -> float:
        """Add its share of the gradients; returns its loss."""
        outcome = batches.run(self.model, batch, self.loss_fn, self._device())
        loss = float(outcome.loss.detach())
        if not math.isfinite(loss):
            why = "every label of it is -100" if outcome.weight == 0 else "lower the learning rate or look at it"
            raise NonFiniteLossError(f"{what} of {count} is {loss}; no weight was touched. About that batch: {why}")
        if not outcome.loss.requires_grad:
            raise TrainingError(
                f"{what} of {count} does not depend on any trainable parameter. Are the adapters switched off, "
                "or is the loss computed under no_grad or from detached outputs? With gradient checkpointing, "
                "call model.enable_input_require_grads() first"
            )
        (outcome.loss / count).backward()  # type: ignore[no-untyped-call]
        return loss

    def _trainable(self) -> dict[str, nn.Parameter]:
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not found:
            raise NoAdapterError(
                "the model has no trainable parameter: add an adapter with peft.get_peft_model(model, LoraConfig(…)), "
                "or load one with is_trainable=True"
            )
        return found

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _total_steps(self, reader: Reader) -> int:
        if reader.length == 0:
            raise TrainingError("the data has no batch")
        if self.max_steps is not None:
            return self.max_steps
        if reader.length is None:
            raise TrainingError("the data has no length, so an epoch has no known number of steps: give max_steps")
        return self.epochs * math.ceil(reader.length / self.accumulation)

    def _check_optimizer(self) -> None:
        """Every trainable parameter is in the optimizer, and nothing is that trains unseen."""
        held = {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        trainable = self._trainable()
        missing = [name for name, p in trainable.items() if id(p) not in held]
        if missing:
            raise TrainingError(
                f"the optimizer lacks {_some(missing)}, so nothing would train them: make the optimizer after adding "
                "the adapter and moving the model, or freeze them with requires_grad_(False)"
            )
        known = {id(p) for p in trainable.values()}
        foreign = sum(p.requires_grad for identity, p in held.items() if identity not in known)
        if foreign:
            raise TrainingError(
                f"the optimizer holds {foreign} trainable tensors that are not parameters of the model: "
                "make them part of the model, so that checkpoints hold them"
            )

    def _check_scheduler(self) -> None:
        if self.scheduler is None:
            return
        if not isinstance(self.scheduler, LRScheduler) or isinstance(self.scheduler, ReduceLROnPlateau):
            raise TrainingError(
                f"the scheduler is a {type(self.scheduler).__name__}, but must be one that steps without a metric, "
                "once per optimizer step"
            )
        if self.scheduler.optimizer is not self.optimizer:
            raise TrainingError(
                "the scheduler belongs to another optimizer: give that one too, or a function that makes the scheduler"
            )

    def _check_fresh(self) -> None:
        """No other run's checkpoints are in the way, and this run's state can be written when the time comes."""
        if self.checkpoint_dir is None:
            return
        present = list_checkpoints(self.checkpoint_dir)
        if present:
            raise CheckpointError(
                f"{self.checkpoint_dir} already holds {present[-1].name}: train with resume=True to go on from it, "
                "or choose another checkpoint_dir"
            )
        remove_drafts(self.checkpoint_dir)
        resume.check_storable(self.optimizer, self.scheduler)

    def _fingerprint(self, reader: Reader, total: int) -> dict[str, Any]:
        """Settings without which a resumed run would differ from an uninterrupted one."""
        settings = {
            **self._settings,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "batches per epoch": reader.length,
        }
        if self.scheduler is not None:
            settings["total steps"] = total
        return settings

    def _save(self, directory: Path, reader: Reader, total: int) -> None:
        state = {
            "settings": self._fingerprint(reader, total),
            "position": reader.state(),
            "history": {"steps": self.history.steps, "evaluations": self.history.evaluations},
            "parameters": resume.parameter_names(self.model, self.optimizer),
            **resume.optimization_state(self.optimizer, self.scheduler),
        }
        checkpoint = Checkpoint(self.step, resume.tensors_to_keep(self.model), state)
        save = (lambda path: adapter.save(self.model, path)) if adapter.is_peft(self.model) else None
        with rng.preserved():  # an uninterrupted run must go on exactly as a resumed one does
            write_checkpoint(directory, checkpoint, save)
        prune(directory, self.keep_checkpoints)

    def _load(self, reader: Reader, total: int) -> dict[str, Any]:
        """Go to the latest checkpoint; returns the random states to train on with. On error nothing is changed."""
        if self.checkpoint_dir is None:
            raise CheckpointError("resume=True needs checkpoint_dir")
        present = list_checkpoints(self.checkpoint_dir)
        if not present:
            raise CheckpointError(f"there is no checkpoint in {self.checkpoint_dir}: train with resume=False to begin")
        checkpoint = read_checkpoint(present[-1])
        resume.check(present[-1], checkpoint, self._fingerprint(reader, total), self.model, self.optimizer, reader)
        if checkpoint.step > total:
            raise CheckpointError(f"{present[-1]} is beyond the {total} steps to train for: raise epochs or max_steps")
        before = reader.capture()
        try:
            reader.resume(checkpoint.state["position"])
        except BaseException:
            reader.restore(before)
            raise
        resume.apply(checkpoint, self.model, self.optimizer, self.scheduler)
        history = checkpoint.state["history"]
        self.history = History(list(history["steps"]), list(history["evaluations"]))
        self.step = checkpoint.step
        remove_drafts(self.checkpoint_dir)
        now: dict[str, Any] = checkpoint.state["position"]["now"]
        return now


def _check_gradients(trainable: dict[str, nn.Parameter]) -> None:
    cut = [name for name, parameter in trainable.items() if parameter.grad is None]
    if cut:
        raise TrainingError(
            f"the loss does not depend on {_some(cut)}, so training would leave them as they are: the graph is cut, "
            "or they are not used. Freeze them with requires_grad_(False), or say allow_unused=True"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more trainable parameters"
