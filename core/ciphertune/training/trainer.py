"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ciphertune._support.denormals import flushing
from ciphertune.errors import CheckpointError, NonFiniteLossError, NothingOutsourcedError, TrainingError
from ciphertune.interleaving.interleaver import Interleaver
from ciphertune.outsourcing.convert import outsourced_layers
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.training import adapter, batches, evaluation
from ciphertune.training.arguments import settings_of
from ciphertune.training.frozen import FrozenCache
from ciphertune.training.gradients import accumulate_gradients, refuse_gradient_hooks
from ciphertune.training.history import History
from ciphertune.training.inference import InferenceModel
from ciphertune.training.loader import ResumableLoader
from ciphertune.training.losses import Loss
from ciphertune.training.metrics import Metric, MetricFunction
from ciphertune.training.optimization import (
    OptimizerChoice,
    SchedulerChoice,
    check_adapter,
    check_gradients,
    check_optimizer,
    check_schedule,
    check_scheduler,
    make_optimizer,
    scheduler_factory,
    trainable_parameters,
)
from ciphertune.training.ranks import divide_ranks
from ciphertune.training.run_state import RunState
from ciphertune.training.settings import SettingsArguments, TrainingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Stopping(Exception):  # noqa: N818 - no error: an evaluation is given up
    """The run that an evaluation belongs to is to stop."""


class LoraTrainer:
    """Trains the trainable parameters of a model, which are its adapters' as a rule.

    ``LoraTrainer(model, learning_rate=1e-3, epochs=2)``: the attributes of ``TrainingSettings`` are keyword arguments.

    Batches are mappings of model arguments (dict, ``BatchEncoding``) or tuples ``(inputs…, targets)``. The model's
    weights change only in whole, finite optimizer steps.

    Args:
        model: any module with trainable parameters.
        settings: how to train; the defaults of ``TrainingSettings`` if not given.
        optimizer: None for AdamW over the trainable parameters, an optimizer, or a function that makes one from them.
        scheduler: None for that of the ``schedule`` in the settings, a scheduler of ``optimizer``, or a function of the
            optimizer and the total number of optimizer steps that makes one. It steps once per optimizer step.
        loss_fn: called as ``loss_fn(logits, labels)``, giving a scalar: with the ``logits`` that the model returns, or
            with all that it returns where nothing has this name, and with the ``labels`` of a mapping, which the model
            does not get then, or the targets of a tuple. A function whose second parameter is named ``batch`` is called
            as ``loss_fn(outputs, batch)``, with what the model returns for the whole batch, and with that batch. None
            to use the ``loss`` that the model returns; it gets the targets of a tuple as its ``labels``.
        training_args: a ``transformers.TrainingArguments``, its ``vars``, or a dictionary of some of its attributes,
            for settings that ``changes`` does not name; see ``ciphertune.training.arguments.settings_of``.
        eval_metric_fn: called as ``eval_metric_fn(model, eval_data)`` in each evaluation, in evaluation mode and
            without gradients; gives numbers by name, which are among its figures.
        metric: makes what is measured in an evaluation beside the loss, anew for each, such as
            ``lambda: ClassificationMetric(labels=3)``.
        device: where to move the model; by default it stays, and batches go to its first parameter's device.
        plugins: hook plugins; those of the process unless given.
        require_outsourced: refuse a model without outsourced layers; set to False for a comparison run in the clear.
        require_adapter: refuse a model without an adapter in which nothing is frozen: all that stayed at the client
            would be trained. Set to False where that is meant.
        allow_unused: allow trainable parameters that the loss does not depend on.
        changes: attributes of ``TrainingSettings``, in place of those of ``settings``.

    Attributes:
        settings: the settings, changes included.
        history: metrics of the current or last run.
        step: optimizer steps done in it.
        total_steps: those of the whole of it.
        stopped: whether it ended before its last step because ``stop`` asked for it.
        optimizer: the optimizer.
        scheduler: the scheduler; None before training where a function makes it, or where there is none.

    Raises:
        NoAdapterError: the model has no trainable parameter, or no adapter and nothing frozen.
        NothingOutsourcedError: the model has no outsourced layer and ``require_outsourced`` is set.
        TrainingError: an argument is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings | None = None,
        *,
        optimizer: OptimizerChoice = None,
        scheduler: SchedulerChoice = None,
        loss_fn: batches.LossFunction | None = None,
        training_args: Any = None,
        eval_metric_fn: MetricFunction | None = None,
        metric: Callable[[], Metric] | None = None,
        device: str | torch.device | None = None,
        plugins: PluginManager | None = None,
        require_outsourced: bool = True,
        require_adapter: bool = True,
        allow_unused: bool = False,
        **changes: Unpack[SettingsArguments],
    ) -> None:
        if training_args is not None:
            stated: Any = settings_of(training_args, own_optimizer=optimizer is None and scheduler is None)
            changes = {**stated, **changes}
        self.settings = dataclasses.replace(settings or TrainingSettings(), **changes)
        check_schedule(self.settings, optimizer, scheduler)
        self.model = model
        self.loss_fn = None if loss_fn is None else Loss.of(loss_fn)
        self.metric = metric
        if eval_metric_fn is not None and not callable(eval_metric_fn):
            raise TrainingError(f"eval_metric_fn is a {type(eval_metric_fn).__name__}, and no function")
        self.eval_metric_fn = eval_metric_fn
        self.plugins = plugins if plugins is not None else plugin_manager()
        self.allow_unused = allow_unused
        self.history = History()
        self.step = 0
        self.total_steps = 0
        self.stopped = False
        self._stop_asked = threading.Event()
        trainable = list(trainable_parameters(model).values())
        if require_outsourced and not outsourced_layers(model):
            raise NothingOutsourcedError(
                "the model has no outsourced layer: call ciphertune.outsource(model, to=…) first, "
                "or say require_outsourced=False to train in the clear"
            )
        if require_adapter:
            check_adapter(model)
        if device is not None:
            model.to(device)
        self._interleaver: Interleaver | None = None  # while training
        self._frozen: FrozenCache | None = None  # likewise
        self._compared = self.settings.compared_at_resume(own_optimizer=optimizer is None)
        self.optimizer = make_optimizer(optimizer, trainable, self.settings)
        self.scheduler = scheduler if isinstance(scheduler, LRScheduler) else None
        self._make_scheduler = None if isinstance(scheduler, LRScheduler) else scheduler
        if scheduler is None:
            self._make_scheduler = scheduler_factory(self.settings)
        if self.scheduler is not None:
            check_scheduler(self.scheduler, self.optimizer)
        check_optimizer(self.optimizer, model)

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

    def stop(self) -> None:
        """End the current run after the step under way, with a checkpoint where there is a ``checkpoint_dir``.

        From any thread, and from a signal's handler. An evaluation under way is given up, and made when the run is
        resumed. ``train`` returns as usual, and ``stopped`` is set.
        """
        self._stop_asked.set()

    @flushing()
    def train(self, data: Iterable[Any], eval_data: Iterable[Any] | None = None, *, resume: bool = False) -> History:
        """Train, or go on from the latest checkpoint exactly as if training had never stopped.

        Args:
            data: a DataLoader, a list of batches, or anything that gives them anew each time it is iterated.
                Without a length, ``steps`` is needed.
            eval_data: the same, for evaluations.
            resume: go on from the latest checkpoint of ``checkpoint_dir``. Model, data and settings must be as they
                were; ``epochs`` and ``steps`` may be others where the learning rates of the steps that were done
                would have been the same.

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
        elif self.settings.eval_every is not None:
            raise TrainingError("eval_every is set but there is no eval_data")
        loader = ResumableLoader(data, self.settings.accumulation)
        total = self.total_steps = self._total_steps(loader)
        check_optimizer(self.optimizer, self.model)
        if self._make_scheduler is not None:
            self.scheduler = self._make_scheduler(self.optimizer, total)
            check_scheduler(self.scheduler, self.optimizer)
        state = RunState(self.model, self.optimizer, self.scheduler, loader, total, self._compared)
        random_states = self._begin(state, resume)
        self.optimizer.zero_grad()
        self.model.train()
        self.stopped = False
        self._stop_asked.clear()
        reason = "failed"
        try:
            self.plugins.observe("ciphertune_training_start", trainer=self, total_steps=total, start_step=self.step)
            if random_states is not None:
                loader.restore(random_states)
            with self._interleaving(), self._freezing():
                self._run(state, eval_data)
            reason = "interrupted" if self.stopped else "finished"
        except (KeyboardInterrupt, SystemExit):
            reason = "interrupted"
            raise
        finally:
            self.optimizer.zero_grad()
            self.plugins.observe("ciphertune_training_end", trainer=self, step=self.step, reason=reason)
        return self.history

    @flushing()
    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """Compute the mean loss over data in evaluation mode; modes and random states are left as they were.

        Args:
            data: batches as for training.

        Returns:
            ``eval_loss``, every target counting the same (labels other than -100, as the model's loss counts them;
            samples, where targets are not class indices), ``perplexity`` for a language model with its own loss, and
            what ``metric`` and ``eval_metric_fn`` measure.

        Raises:
            NonFiniteLossError: a batch's loss is NaN or infinite.
            TrainingError: there is no target in the data, or a batch has the wrong form.
        """
        return self._measured(data, data)

    def _measured(self, data: Iterable[Any], whole: Iterable[Any]) -> dict[str, float]:
        """Evaluate on data, which is read once, and by ``eval_metric_fn`` on the whole of it."""
        metric = None if self.metric is None else self.metric()
        metrics = evaluation.evaluate(self.model, data, self.loss_fn, metric, self._frozen)
        if self.eval_metric_fn is not None:
            if self._stop_asked.is_set() and data is not whole:
                raise _Stopping
            own = evaluation.measure(self.model, whole, self.eval_metric_fn)
            if taken := metrics.keys() & own.keys():
                raise TrainingError(f"eval_metric_fn returns {', '.join(sorted(taken))}, which is measured already")
            metrics |= own
        self.plugins.observe("ciphertune_evaluation", trainer=self, step=self.step, metrics=dict(metrics))
        return metrics

    @property
    def _checkpoint_dir(self) -> Path | None:
        directory = self.settings.checkpoint_dir
        return None if directory is None else Path(directory)

    def _total_steps(self, loader: ResumableLoader) -> int:
        if loader.length == 0:
            raise TrainingError("the data has no batch")
        if self.settings.steps is not None:
            return self.settings.steps
        if loader.length is None:
            raise TrainingError("the data has no length, so an epoch has no known number of steps: give steps")
        return self.settings.epochs * math.ceil(loader.length / self.settings.accumulation)

    def _begin(self, state: RunState, resume: bool) -> dict[str, Any] | None:
        """Begin a run, or resume one; returns the random states that the resumed run goes on with."""
        directory = self._checkpoint_dir
        if not resume:
            if directory is not None:
                state.check_fresh(directory)
            self.step, self.history = 0, History()
            return None
        if directory is None:
            raise CheckpointError("resume=True needs checkpoint_dir")
        point = state.resume(directory)
        self.step, self.history = point.step, point.history
        return point.random_states

    @contextlib.contextmanager
    def _interleaving(self) -> Iterator[None]:
        """Start threads for micro-batches where more than one is to be under way."""
        if self.settings.interleave == 1:
            yield
            return
        refuse_gradient_hooks(trainable_parameters(self.model))
        with Interleaver(self.settings.interleave) as self._interleaver:
            try:
                yield
            finally:
                self._interleaver = None

    @contextlib.contextmanager
    def _freezing(self) -> Iterator[None]:
        """Keep what frozen blocks give, where that is asked for."""
        if self.settings.frozen_cache == 0:
            yield
            return
        with FrozenCache(self.model, self.loss_fn, self.settings.frozen_cache << 20) as self._frozen:
            try:
                yield
            finally:
                self._frozen = None

    def _run(self, state: RunState, eval_data: Iterable[Any] | None) -> None:
        """Step until the end, with evaluations and checkpoints where they are due."""
        settings, loader, directory = self.settings, state.loader, self._checkpoint_dir
        done = self.step == state.total_steps
        owed = settings.eval_on_start if self.step == 0 else self._due(settings.eval_every, loader, done)
        if owed:  # of a run that is resumed only where it was stopped before this evaluation
            self._evaluate_once(eval_data)
        first = True
        while self.step < state.total_steps and not self._stop_asked.is_set():
            metrics = self._train_step(loader, first)
            first = False
            self.history.steps.append(metrics)
            self.plugins.observe("ciphertune_training_step", trainer=self, step=self.step, metrics=dict(metrics))
            done = self.step == state.total_steps
            if self._due(settings.eval_every, loader, done):
                self._evaluate_once(eval_data)
            stopping = self._stop_asked.is_set()
            if directory is not None and (done or stopping or self._due(settings.checkpoint_every, loader, done)):
                state.save(directory, self.step, self.history, settings.keep_checkpoints)
        self.stopped = self._stop_asked.is_set()

    def _evaluate_once(self, data: Iterable[Any] | None) -> None:
        """Evaluate after this step, unless that was done or the run is to stop."""
        evaluations = self.history.evaluations
        if data is None or (evaluations and evaluations[-1]["step"] == self.step):
            return
        with contextlib.suppress(_Stopping):
            evaluations.append({"step": self.step, **self._measured(self._until_stopped(data), data)})

    def _until_stopped(self, data: Iterable[Any]) -> Iterator[Any]:
        for batch in data:
            if self._stop_asked.is_set():
                raise _Stopping
            yield batch

    def _due(self, every: int | None, loader: ResumableLoader, done: bool) -> bool:
        return self.step % every == 0 if every is not None else loader.epoch_complete or done

    def _train_step(self, loader: ResumableLoader, first: bool) -> dict[str, float]:
        """Do one optimizer step; on any error before its end, weights and optimizer state are untouched."""
        begin = time.perf_counter()
        group = loader.next_step()
        where = f"step {self.step + 1} (epoch {loader.epoch})"
        if self._frozen is not None and (first or loader.consumed == len(group)):
            self._frozen.begin("training")
        loss = accumulate_gradients(
            self.model, group, self.loss_fn, where=where, interleaver=self._interleaver, frozen=self._frozen
        )
        trainable = trainable_parameters(self.model)
        if first and not self.allow_unused:
            check_gradients(trainable)
        if self.settings.gradient_norms:
            self._keep_norms(trainable)
        limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
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
        divide_ranks(self.model, self.step + 1)
        self.optimizer.zero_grad()
        self.step += 1
        unit = batches.size(group[0])[0]
        return {
            "step": self.step,
            "epoch": loader.epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "seconds": time.perf_counter() - begin,
            unit: sum(batches.size(batch)[1] for batch in group),
        }

    def _keep_norms(self, trainable: Mapping[str, nn.Parameter]) -> None:
        kept = self.history.gradient_norms
        gradients = [parameter.grad for parameter in trainable.values()]
        norms = [
            torch.tensor(math.nan) if g is None else torch.linalg.vector_norm(g.detach().float()) for g in gradients
        ]
        for name, norm in zip(trainable, torch.stack([each.cpu() for each in norms]).tolist(), strict=True):
            kept.setdefault(name, []).append(norm)
