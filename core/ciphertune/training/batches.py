"""Batches: their form, and the number of tokens or samples in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ciphertune.errors import TrainingError

LossFunction = Callable[[Any, Any], Tensor]
"""A function of logits and labels, or of outputs and batch: see ``ciphertune.training.losses.Loss``."""
IGNORED_LABEL = -100
"""Label that the losses of torch and transformers skip."""

LanguageModel = Literal["shifted", "aligned"]
"""Output that a language model's own loss holds a label against: one position earlier, or at the same position."""


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


def size(batch: Any) -> tuple[Literal["tokens", "samples"], int]:
    """The size of a batch: tokens that are not padding where it has ``input_ids``, else samples."""
    if isinstance(batch, Mapping):
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if isinstance(tokens, Tensor):
            if isinstance(mask, Tensor) and mask.shape == tokens.shape:
                return "tokens", int((mask != 0).sum())
            return "tokens", tokens.numel()
    return "samples", samples(batch)


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
    return content(batch).hex()[:8]


def content(value: Any) -> bytes:
    """SHA-256 of a batch, or of what is in one: dtypes, shapes and values of tensors, keys, texts and numbers."""
    state = hashlib.sha256()
    for part in _parts(value):
        state.update(part)
    return state.digest()


def count_targets(targets: Any, shifted: bool) -> int | None:
    """Number of targets that a mean loss is the mean of; None where they are not class indices."""
    if not isinstance(targets, Tensor) or targets.dim() == 0 or targets.is_floating_point() or targets.is_complex():
        return None
    counted = targets[..., 1:] if shifted else targets
    return int((counted != IGNORED_LABEL).sum())


def samples(batch: Any) -> int:
    """Length of the first dimension of the first tensor."""
    items: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    for item in items:
        if isinstance(item, Tensor) and item.dim() > 0:
            return len(item)
        if isinstance(item, (Mapping, list, tuple)) and item:
            return samples(item)
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
