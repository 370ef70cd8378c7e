"""The optimizer and the scheduler of a training run: made, and checked against the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from ciphertune.errors import NoAdapterError, TrainingError
from ciphertune.outsourcing.convert import outsourced_layers
from ciphertune.outsourcing.trial import frozen_from_birth
from ciphertune.training.adapter import has_adapter
from ciphertune.training.settings import TrainingSettings

OptimizerChoice = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
SchedulerChoice = LRScheduler | SchedulerFactory | None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by name.

    Raises:
        NoAdapterError: there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise NoAdapterError(
            "the model has no trainable parameter: add an adapter with peft.get_peft_model(model, LoraConfig(…)), "
            "or load one with is_trainable=True"
        )
    return found


def make_optimizer(choice: OptimizerChoice, parameters: list[nn.Parameter], settings: TrainingSettings) -> Optimizer:
    """The optimizer that was given, that the function which was given makes, or AdamW.

    Raises:
        TrainingError: the function made something else.
    """
    if isinstance(choice, Optimizer):
        return choice
    if choice is None:
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    made = choice(parameters)
    if not isinstance(made, Optimizer):
        raise TrainingError(f"optimizer must be or make a torch optimizer, but this is a {type(made).__name__}")
    return made


def scheduler_factory(settings: TrainingSettings) -> SchedulerFactory | None:
    """A function of the optimizer and the number of steps that makes the schedule's scheduler; None for constant.

    The function raises ``TrainingError`` where warming up would take all steps.
    """
    if settings.warmup_steps > 0:
        return lambda optimizer, total: LambdaLR(optimizer, _warmed(settings, total))
    if settings.schedule == "linear":
        return lambda optimizer, total: PolynomialLR(optimizer, total_iters=total)
    if settings.schedule == "cosine":
        return lambda optimizer, total: OneCycleLR(
            optimizer, max_lr=settings.learning_rate, total_steps=total + 1, pct_start=0.1, cycle_momentum=False
        )
    return None


def _warmed(settings: TrainingSettings, total: int) -> Callable[[int], float]:
    """A function that gives the factor of the learning rate for each step from 0."""
    given = settings.warmup_steps
    warm = math.ceil(given * total) if given < 1 else int(given)
    if warm >= total:
        raise TrainingError(f"warmup_steps is {given:g}, so {warm} steps, and there are {total} in all: lower it")

    def factor(step: int) -> float:
        if step < warm:
            # The first step is one already, else nothing would be learned from its batches.
            return (step + 1) / (warm + 1)
        left = min((step - warm) / (total - warm), 1.0)
        if settings.schedule == "linear":
            return 1 - left
        return (1 + math.cos(math.pi * left)) / 2 if settings.schedule == "cosine" else 1.0

    return factor


def check_schedule(settings: TrainingSettings, optimizer: OptimizerChoice, scheduler: SchedulerChoice) -> None:
    """Raise ``TrainingError`` where a schedule is asked for beside an optimizer or a scheduler that is given."""
    asked = f"schedule {settings.schedule!r}" if settings.schedule != "constant" else ""
    asked = asked or (f"warmup_steps {settings.warmup_steps:g}" if settings.warmup_steps else "")
    if asked and not (optimizer is None and scheduler is None):
        raise TrainingError(
            f"{asked} is for the optimizer that LoraTrainer makes: leave it out, and give a "
            "scheduler for an optimizer of your own"
        )


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Check that the optimizer holds all that is trainable in the model and nothing else that is.

    Raises:
        NoAdapterError: nothing in the model is trainable.
        TrainingError: a trainable parameter is missing, or a trainable tensor is not in the model.
    """
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    trainable = trainable_parameters(model)
    missing = [name for name, p in trainable.items() if id(p) not in held]
    if missing:
        raise TrainingError(
            f"the optimizer lacks {_first_names(missing)}, so nothing would train them: make the optimizer after "
            "adding the adapter and moving the model, or freeze them with requires_grad_(False)"
        )
    known = {id(p) for p in trainable.values()}
    foreign = sum(p.requires_grad for identity, p in held.items() if identity not in known)
    if foreign:
        raise TrainingError(
            f"the optimizer holds {foreign} trainable tensors that are not parameters of the model: "
            "make them part of the model, so that checkpoints hold them"
        )


def check_scheduler(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    """Check that the scheduler can step without a metric and belongs to the optimizer.

    Raises:
        TrainingError: it does not.
    """
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TrainingError(
            f"the scheduler is a {type(scheduler).__name__}, but must be one that steps without a metric, "
            "once per optimizer step"
        )
    if scheduler.optimizer is not optimizer:
        raise TrainingError(
            "the scheduler belongs to another optimizer: give that one too, or a function that makes the scheduler"
        )


def check_adapter(model: nn.Module) -> None:
    """Raise ``NoAdapterError`` for a model without an adapter in which nothing is frozen either."""
    trainable = trainable_parameters(model)
    own = frozen_from_birth(model)
    here = any(not p.requires_grad and p.numel() > 0 and id(p) not in own for p in model.parameters())
    # Whoever froze layers before they were outsourced left the others to train.
    away = any(
        layer.original is not None and not layer.original.weight.requires_grad for layer in outsourced_layers(model)
    )
    if not (here or away) and not has_adapter(model):
        raise NoAdapterError(
            f"the model has no adapter and nothing in it is frozen, so that {_first_names(list(trainable))} would be "
            "trained: add an adapter with peft.get_peft_model(model, LoraConfig(…)). To train what is here, freeze "
            "the rest with requires_grad_(False), or say require_adapter=False"
        )


def check_gradients(trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise ``TrainingError`` where a trainable parameter got no gradient."""
    cut = [name for name, parameter in trainable.items() if parameter.grad is None]
    if cut:
        raise TrainingError(
            f"the loss does not depend on {_first_names(cut)}, so training would leave them as they are: the graph is "
            "cut, or they are not used. Freeze them with requires_grad_(False), or say allow_unused=True"
        )


def _first_names(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more trainable parameters"
