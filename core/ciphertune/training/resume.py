"""What of a model and its optimizer goes into a checkpoint, and how it comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ciphertune._support.torch_compat import scheduler_state
from ciphertune.errors import CheckpointError
from ciphertune.training import codec
from ciphertune.training.checkpoint import Checkpoint, unusable
from ciphertune.training.reader import Reader


def tensors_to_keep(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of trainable parameters and persistent buffers (running statistics change in training)."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in _live_tensors(model).items()}


def optimization_state(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """The state dicts of optimizer and scheduler."""
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler_state(scheduler),
    }


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of each of the optimizer's groups' parameters; empty for tensors that are not in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def check_storable(optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Raise ``CheckpointError`` now rather than at the first checkpoint where these cannot be stored."""
    for name, state in optimization_state(optimizer, scheduler).items():
        codec.encode(state, {}, name)


def check(
    path: Path, checkpoint: Checkpoint, settings: dict[str, Any], model: nn.Module, optimizer: Optimizer, reader: Reader
) -> None:
    """Check that a checkpoint fits, changing nothing.

    Raises:
        CheckpointError: it is of another model, data or settings, or its content makes no sense.
    """
    _check_tensors(path / "trainable.safetensors", checkpoint.trainable, _live_tensors(model))
    state, file = checkpoint.state, path / "state.json"
    try:
        stored = dict(state["settings"])
        differing = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    except (KeyError, TypeError, ValueError) as error:
        raise unusable(file, error) from error
    if differing:
        listed = "; ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in differing)
        raise CheckpointError(
            f"{path} belongs to another run: {listed}. Train with what it was, or begin anew in another checkpoint_dir"
        )
    try:
        reader.check(state["position"])
        _check_history(state["history"], checkpoint.step)
        _check_optimizer(file, state, model, optimizer)
        if settings["scheduler"] is not None and not isinstance(state["scheduler"], dict):
            raise TypeError("the scheduler state is no object")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise unusable(file, error) from error


def apply(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Put a checked checkpoint's content into the model, the optimizer and the scheduler."""
    with torch.no_grad():
        for name, tensor in _live_tensors(model).items():
            tensor.copy_(checkpoint.trainable[name])
    optimizer.load_state_dict(checkpoint.state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint.state["scheduler"])


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
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


def _check_optimizer(file: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    if state["parameters"] != parameter_names(model, optimizer):
        raise CheckpointError(
            f"{file} does not fit the optimizer: it held other parameters, or in another order. Nothing was changed. "
            "Make model and optimizer as they were, or begin anew in another checkpoint_dir"
        )
    stored, current = state["optimizer"], optimizer.state_dict()
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
    if len(history["steps"]) != step:
        raise ValueError(f"the history has {len(history['steps'])} steps of {step}")
