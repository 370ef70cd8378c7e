"""Batches: their form, their loss, and the number of tokens or samples in them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ciphertune.errors import TrainingError

LossFunction = Callable[[Any, Any], Tensor]
IGNORED_LABEL = -100
"""Label that the losses of torch and transformers skip."""

LanguageModel = Literal["shifted", "aligned"]
"""Output that a language model's own loss holds a label against: one position earlier, or at the same position."""


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch.

    Attributes:
        loss: scalar.
        weight: number of targets that the loss is the mean of.
    """

    loss: Tensor
    weight: int


def check_data(data: Any, name: str) -> None:
    """Check that data can be read as batches more than once.

    Raises:
        TrainingError: it is no iterable of batches, or can be read only once.
    """
    if isinstance(data, (Mapping, str, bytes, Tensor)) or not (
        hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise TrainingError(
            f"{name} must be an iterable of batches, such as a DataLoader or a list; got a {type(data).__name__}"
        )
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise TrainingError(
            f"{name} is a Dataset, which gives samples: wrap it in torch.utils.data.DataLoader({name}, batch_size=…)"
        )
    if isinstance(data, Iterator):
        raise TrainingError(
            f"{name} is a {type(data).__name__}, which can be read only once, and training reads it again every epoch "
            "and when it resumes: give a list, a DataLoader, or an object whose __iter__ starts anew"
        )


def length_of(data: Any) -> int | None:
    """Number of batches, None where data has no length."""
    try:
        return len(data)
    except TypeError:
        return None


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on ``device``; mappings become dicts, so that ``BatchEncoding`` needs no import."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(item, device) for item in value]
    return value


def batch_loss(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None, seen: Callable[[Any, Any], object] | None = None
) -> BatchLoss:
    """Compute the loss of a batch, on the device of the model's first parameter.

    Args:
        model: called with ``**batch`` for a mapping, with all but the last element for a tuple or list.
        batch: mapping, or tuple or list ``(inputs…, targets)``.
        loss_fn: called with the outputs and the targets (of a tuple) or the whole batch (of a mapping); None to
            take the loss from the model's outputs.
        seen: is called with the same.

    Raises:
        TrainingError: the batch has another form, or no scalar loss comes out.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        batch = to_device(batch, device)
        outputs = model(**batch)
        if seen is not None:
            seen(outputs, batch)
        loss = _model_loss(outputs, batch) if loss_fn is None else loss_fn(outputs, batch)
        shifted = loss_fn is None and language_model(model) == "shifted"
        weight = count_targets(batch.get("labels"), shifted)
    elif isinstance(batch, (tuple, list)):
        if len(batch) < 2:
            raise TrainingError(f"a tuple batch must be (inputs…, targets), but this one has {len(batch)} elements")
        if loss_fn is None:
            raise TrainingError(
                "tuple batches need a loss: give LoraTrainer(…, loss_fn=…), called with outputs and targets, "
                "or dict batches with the labels that the model computes its loss from"
            )
        *inputs, targets = to_device(batch, device)
        outputs = model(*inputs)
        if seen is not None:
            seen(outputs, targets)
        loss = loss_fn(outputs, targets)
        weight = count_targets(targets, False)
    else:
        raise TrainingError(
            f"a batch must be a tuple (inputs…, targets) or a mapping of model arguments, not a {type(batch).__name__}"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TrainingError(f"the loss must be a tensor of one number, got {got}: average it over the batch")
    return BatchLoss(loss.reshape(()), _samples(batch) if weight is None else weight)


def size(batch: Any) -> tuple[Literal["tokens", "samples"], int]:
    """The size of a batch: tokens that are not padding where it has ``input_ids``, else samples."""
    if isinstance(batch, Mapping):
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if isinstance(tokens, Tensor):
            if isinstance(mask, Tensor) and mask.shape == tokens.shape:
                return "tokens", int((mask != 0).sum())
            return "tokens", tokens.numel()
    return "samples", _samples(batch)


def language_model(model: nn.Module) -> LanguageModel | None:
    """The way a transformers language model's own loss reads its labels; None for any other model."""
    getter = getattr(model, "get_base_model", None)
    base = getter() if callable(getter) else model
    names = " ".join(kind.__name__ for kind in type(base).__mro__)
    if not re.search(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration)\b", names):
        return None
    two_sided = "ForMaskedLM" in names or getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return "aligned" if two_sided else "shifted"


def digest(batch: Any) -> str:
    """Eight hex digits that distinguish batches; too few to reveal their content."""
    state = hashlib.sha256()
    for part in _parts(batch):
        state.update(part)
    return state.hexdigest()[:8]


def _model_loss(outputs: Any, batch: Mapping[str, Any]) -> Any:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        hint = "" if "labels" in batch else "; the batch has no 'labels'"
        raise TrainingError(
            f"the model gave no loss{hint}: put what it computes its loss from into the batch, "
            "or give LoraTrainer(…, loss_fn=…), called with outputs and batch"
        )
    return loss


def count_targets(targets: Any, shifted: bool) -> int | None:
    """Number of targets that a mean loss is the mean of; None where they are not class indices."""
    if not isinstance(targets, Tensor) or targets.dim() == 0 or targets.is_floating_point() or targets.is_complex():
        return None
    counted = targets[..., 1:] if shifted else targets
    return int((counted != IGNORED_LABEL).sum())


def _samples(batch: Any) -> int:
    """Length of the first dimension of the first tensor."""
    items: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    for item in items:
        if isinstance(item, Tensor) and item.dim() > 0:
            return len(item)
        if isinstance(item, (Mapping, list, tuple)) and item:
            return _samples(item)
    return 1


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        if value.layout == torch.strided and not value.is_meta:
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key).encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, (str, int, float)):
        yield repr(value).encode()
