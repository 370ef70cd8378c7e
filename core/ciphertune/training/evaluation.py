"""The loss on held-out data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ciphertune.errors import NonFiniteLossError, TrainingError
from ciphertune.training import rng
from ciphertune.training.batches import language_model
from ciphertune.training.frozen import FrozenCache
from ciphertune.training.inference import evaluating
from ciphertune.training.losses import Loss, batch_loss
from ciphertune.training.metrics import Metric, MetricFunction


def measure(model: nn.Module, data: Iterable[Any], function: MetricFunction) -> dict[str, float]:
    """Call a function that measures a model on data, in evaluation mode; modes and random states stay as they were.

    Raises:
        TrainingError: it returns something other than numbers by name.
    """
    with rng.preserved(), evaluating(model):
        found = function(model, data)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise TrainingError(f"eval_metric_fn must return a dictionary of numbers by name, not a {type(found).__name__}")
    try:
        return {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError):
        raise TrainingError("eval_metric_fn must return numbers: a value of its dictionary is none") from None


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss | None,
    metric: Metric | None = None,
    frozen: FrozenCache | None = None,
) -> dict[str, float]:
    """Compute the mean loss over data in evaluation mode, with every target counting the same.

    Modules' modes and random states are left as they were.

    Args:
        model: any module.
        data: batches.
        loss_fn: as for ``batch_loss``.
        metric: a fresh one, which sees every batch.
        frozen: keeps what frozen blocks give; None for nothing that does.

    Returns:
        ``eval_loss``; for a language model with its own loss ``perplexity``; and what the metric gives.

    Raises:
        NonFiniteLossError: a batch's loss is NaN or infinite.
        TrainingError: there is no target in the data, or a batch has the wrong form.
    """
    total, weight = 0.0, 0
    if frozen is not None:
        frozen.begin("evaluation")
    with rng.preserved(), evaluating(model):
        for index, batch in enumerate(data):
            with contextlib.nullcontext() if frozen is None else frozen.going_on("evaluation", batch):
                result = batch_loss(model, batch, loss_fn, None if metric is None else metric.add)
            if result.weight == 0:  # a mean over no target is NaN by definition
                continue
            loss = float(result.loss)
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"evaluation: the loss of batch {index + 1} is {loss}")
            total += loss * result.weight
            weight += result.weight
    if weight == 0:
        raise TrainingError("the evaluation data has no batch, or no label other than -100 in any batch")
    mean = total / weight
    metrics = {"eval_loss": mean}
    if loss_fn is None and language_model(model) is not None:
        metrics["perplexity"] = math.exp(mean) if mean < 709 else math.inf
    return metrics if metric is None else {**metrics, **metric.result()}
