"""Adapters that Concrete ML trained, read from the checkpoints that its trainer writes."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune.errors import CheckpointError
from ciphertune.training.optimization import trainable_parameters

_NAME = re.compile(r"checkpoint_epoch_(\d+)\.pth")
_WHOLE = ("complete_model.pth", "model.pth")
"""Files that ``save_and_clear_private_info`` writes: weights without anything else."""

_PREFIX = "inference_model."
"""Of names in these files: there the model hangs in Concrete ML's own module."""


@dataclasses.dataclass(frozen=True)
class ConcreteMLCheckpoint:
    """What a checkpoint of Concrete ML's trainer tells beside the adapter.

    Attributes:
        path: the file.
        epoch: epochs done; 0 where the file does not say.
        step: batches done (not optimizer steps); 0 where the file does not say.
        losses: of each batch.
        gradient_norms: for each parameter, norms of its gradient when it was logged.
        optimizer: state dict of the optimizer, for ``load_state_dict`` of one of the same class made in the same way.
        scheduler: state dict of the scheduler.
    """

    path: Path
    epoch: int = 0
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    gradient_norms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    scheduler: dict[str, Any] | None = dataclasses.field(default=None, repr=False)


def load_concrete_ml(model: nn.Module, path: str | Path) -> ConcreteMLCheckpoint:
    """Give a model the adapter of a checkpoint that Concrete ML's ``LoraTrainer`` wrote. No code in it is ever run.

    The base model is not read: it is the one that the adapter was trained on, in the clear or outsourced.

    Args:
        model: with adapters as they were there (``peft.get_peft_model`` with the same ``LoraConfig``).
        path: a ``checkpoint_epoch_N.pth``; a folder with several, of which the one of the largest N is read; or what
            ``save_and_clear_private_info`` wrote, a folder or its ``complete_model.pth``.

    Returns:
        The rest of the checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, holds other than plain values and tensors, or its adapter is of
            another model or configuration. Nothing was changed.
        NoAdapterError: nothing in the model is trainable.
    """
    file = _file(Path(path))
    content = _read(file)
    weights = content.get("model_state_dict", content)
    wanted = trainable_parameters(model)
    held = _tensors(file, weights)
    found = {name: held[name] for name in wanted if name in held}
    wrong = [f"{name} is missing" for name in wanted if name not in held]
    known = {name for name, _ in model.named_parameters()}
    wrong += [f"{name} is not in the model" for name in held if ".lora_" in name and name not in known]
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            wrong.append(f"{name} was {tuple(tensor.shape)} and is {tuple(wanted[name].shape)}")
    if wrong:
        raise CheckpointError(
            f"the adapter in {file} does not fit the model in {len(wrong)} places: {'; '.join(sorted(wrong)[:3])}. "
            "Nothing was changed. Make the adapter with the LoraConfig that it was trained with"
        )
    bad = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(f"{file}: {bad[0]} holds values that are not finite. Nothing was changed")
    try:
        rest = _rest(file, content)
    except (TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, error) from error
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in held}
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
        for name, buffer in buffers.items():  # running statistics, which training changes
            if buffer.shape == held[name].shape and buffer.numel():
                buffer.copy_(held[name])
    return rest


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    numbered = [(int(match[1]), each) for each in _entries(path) if (match := _NAME.fullmatch(each.name))]
    if numbered:
        return max(numbered)[1]
    for name in _WHOLE:
        if (path / name).is_file():
            return path / name
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} is an adapter as peft saves it, which needs no conversion: load it with "
            "peft.PeftModel.from_pretrained(model, path, is_trainable=True)"
        )
    raise CheckpointError(
        f"{path} holds no checkpoint of Concrete ML: checkpoint_epoch_N.pth, complete_model.pth or model.pth"
    )


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _read(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds objects beside plain values and tensors, whose code is not run here. "
            "Write it anew where it was made: torch.save of the model's state_dict()"
        ) from error
    except Exception as error:  # bytes that are no pickle make it fail in any way
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no checkpoint of Concrete ML: it holds a {type(content).__name__}")
    return content


def _tensors(file: Path, weights: Any) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{file} is no checkpoint of Concrete ML: its model_state_dict is no dictionary")
    return {str(name).removeprefix(_PREFIX): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}


def _rest(file: Path, content: Mapping[str, Any]) -> ConcreteMLCheckpoint:
    if "model_state_dict" not in content:
        return ConcreteMLCheckpoint(file)
    return ConcreteMLCheckpoint(
        path=file,
        epoch=int(content.get("epoch", 0)),
        step=int(content.get("global_step", 0)),
        losses=[float(loss) for loss in content.get("training_losses", [])],
        gradient_norms={
            str(name).removeprefix(_PREFIX): [float(norm) for norm in norms]
            for name, norms in content.get("gradient_stats", {}).items()
        },
        optimizer=content.get("optimizer_state_dict"),
        scheduler=content.get("lr_scheduler_state_dict"),
    )


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read as a checkpoint of Concrete ML: {type(error).__name__}: {error}")
