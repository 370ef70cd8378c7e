"""The loss of a batch: the model's own, or a function's, of the two forms that loss functions have."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ciphertune.errors import TrainingError
from ciphertune.training.batches import (
    LossFunction,
    count_targets,
    language_model,
    samples,
    to_device,
)

_WHOLE = "batch"
"""Name of a second parameter that is given all of the batch."""

_MISTAKEN = (AttributeError, IndexError, KeyError, TypeError)
"""Errors of a function that expects other arguments than it gets."""


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch.

    Attributes:
        loss: scalar.
        weight: number of targets that the loss is the mean of.
    """

    loss: Tensor
    weight: int


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss function, and what it is called with.

    Attributes:
        function: gives a scalar.
        whole: whether it is called as ``function(outputs, batch)``, with what the model returned and the batch as it
            is; as ``function(logits, labels)`` otherwise.
        signature: its name and parameters, for errors.
    """

    function: LossFunction
    whole: bool
    signature: str

    @classmethod
    def of(cls, function: Any) -> Loss:
        """Tell by a function's signature what it is to be called with.

        Args:
            function: a function, an object that can be called, or a module. One whose second parameter is named
                ``batch`` gets outputs and batch, any other logits and labels.

        Raises:
            TrainingError: it cannot be called with two arguments.
        """
        if not callable(function):
            raise TrainingError(
                f"loss_fn is a {type(function).__name__}, but must be a function of logits and labels, or of outputs "
                "and batch, or None for the loss that the model returns"
            )
        if isinstance(function, type):
            raise TrainingError(f"loss_fn is the class {function.__name__}: give an instance, {function.__name__}(…)")
        called = function.forward if isinstance(function, nn.Module) else function
        name = getattr(function, "__name__", type(function).__name__)
        try:
            signature = inspect.signature(called)
        except (TypeError, ValueError):  # a builtin that does not say
            return cls(function, False, f"{name}(…)")
        try:
            signature.bind(None, None)
        except TypeError as error:
            raise TrainingError(
                f"loss_fn must take two arguments, logits and labels, or outputs and batch; {name}{signature} does "
                f"not: {error}"
            ) from None
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [each.name for each in signature.parameters.values() if each.kind in kinds]
        return cls(function, names[1:2] == [_WHOLE], f"{name}({', '.join(names[:2]) or '…'})")

    def __call__(self, first: Any, second: Any) -> Tensor:
        """The loss. Raises ``TrainingError`` where the function seems to expect other arguments."""
        try:
            return self.function(first, second)
        except _MISTAKEN as error:
            given = "what the model returned, and the batch" if self.whole else "the logits, and the labels"
            other = (
                f"a function whose second parameter has another name than {_WHOLE!r} is given logits and labels"
                if self.whole
                else f"a function whose second parameter is named {_WHOLE!r} is given what the model returned, and the "
                "whole batch"
            )
            raise TrainingError(
                f"the loss function {self.signature} failed with a {type(error).__name__}. It was given {given}: "
                f"{_form(first)}, and {_form(second)}; {other}"
            ) from error


def batch_loss(
    model: nn.Module, batch: Any, loss: Loss | None, seen: Callable[[Any, Any], object] | None = None
) -> BatchLoss:
    """Compute the loss of a batch, on the device of the model's first parameter.

    Args:
        model: called with ``**batch`` for a mapping, with all but the last element for a tuple or list. With a loss of
            logits and labels it is called without the labels of a mapping, but for an encoder and decoder, which makes
            the decoder's input of them. Without a loss, the last element of a tuple is its ``labels``.
        batch: mapping, or tuple or list ``(inputs…, targets)``.
        loss: None to take the loss from the model's outputs.
        seen: is called with the outputs, and with the targets of a tuple or the whole batch of a mapping.

    Raises:
        TrainingError: the batch has another form, or no scalar loss comes out.
    """
    batch = on_device(model, batch)
    if isinstance(batch, Mapping):
        outputs = outputs_of(model, batch, loss)
        if seen is not None:
            seen(outputs, batch)
        value = _of_mapping(outputs, batch, loss)
        weight = count_targets(batch.get("labels"), loss is None and language_model(model) == "shifted")
    else:
        targets = batch[-1]
        outputs = outputs_of(model, batch, loss)
        if seen is not None:
            seen(outputs, targets)
        value = _of_tuple(outputs, batch, loss)
        weight = count_targets(targets, loss is None and language_model(model) == "shifted")
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TrainingError(f"the loss must be a tensor of one number, got {got}: average it over the batch")
    return BatchLoss(value.reshape(()), samples(batch) if weight is None else weight)


def on_device(model: nn.Module, batch: Any) -> dict[str, Any] | list[Any]:
    """A batch on the device of the model's first parameter: a mapping as a dict, a tuple as a list.

    Raises:
        TrainingError: it is neither, or a tuple without targets.
    """
    if not isinstance(batch, (Mapping, tuple, list)):
        raise TrainingError(
            f"a batch must be a tuple (inputs…, targets) or a mapping of model arguments, not a {type(batch).__name__}"
        )
    if not isinstance(batch, Mapping) and len(batch) < 2:
        raise TrainingError(f"a tuple batch must be (inputs…, targets), but this one has {len(batch)} elements")
    moved: dict[str, Any] | list[Any] = to_device(batch, next(model.parameters()).device)
    return moved


def outputs_of(model: nn.Module, batch: Any, loss: Loss | None) -> Any:
    """What the model returns for a batch that ``on_device`` gave; arguments as of ``batch_loss``."""
    if isinstance(batch, Mapping):
        return model(**_arguments(model, batch, loss))
    *inputs, targets = batch
    return model(*inputs) if loss is not None else _with_labels(model, inputs, targets)


def _arguments(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None) -> Mapping[str, Any]:
    """What of a mapping the model is called with."""
    if loss is None or loss.whole or "labels" not in batch:
        return batch
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}


def _with_labels(model: nn.Module, inputs: list[Any], targets: Any) -> Any:
    """Call a model that computes its own loss with the elements of a tuple."""
    getter: Any = getattr(model, "get_base_model", None)
    base = getter() if callable(getter) else model
    parameters = inspect.signature(base.forward).parameters
    if "labels" in parameters:
        return model(*inputs, labels=targets)
    try:
        inspect.signature(base.forward).bind(*inputs, targets)
    except TypeError:
        raise TrainingError(
            f"the model's forward takes no labels ({type(base).__name__}.forward{inspect.signature(base.forward)}), so "
            "it returns no loss for tuple batches: give LoraTrainer(…, loss_fn=…), called with logits and labels"
        ) from None
    return model(*inputs, targets)


def _of_mapping(outputs: Any, batch: Mapping[str, Any], loss: Loss | None) -> Any:
    if loss is None:
        return _own(outputs, "" if "labels" in batch else "; the batch has no 'labels'")
    if loss.whole:
        return loss(outputs, batch)
    if "labels" not in batch:
        raise TrainingError(
            f"the batch has no 'labels' for the loss function {loss.signature}: put them into it, or name the "
            f"function's second parameter {_WHOLE!r} to be given what the model returned, and the whole batch"
        )
    return loss(_logits(outputs), batch["labels"])


def _of_tuple(outputs: Any, batch: list[Any], loss: Loss | None) -> Any:
    if loss is None:
        return _own(outputs, "")
    return loss(outputs, batch) if loss.whole else loss(_logits(outputs), batch[-1])


def _own(outputs: Any, hint: str) -> Any:
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None:
        raise TrainingError(
            f"the model gave no loss{hint}: put what it computes its loss from into the batch, "
            "or give LoraTrainer(…, loss_fn=…), called with logits and labels, or with outputs and batch"
        )
    return found


def _logits(outputs: Any) -> Any:
    """The logits that a model returned under that name; all that it returned where there are none."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return outputs if found is None else found


def _form(value: Any) -> str:
    """The type of a value, and the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value))}"
    return f"a {type(value).__name__}"
