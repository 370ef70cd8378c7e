"""A model with adapters and the batches to train it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Batch = Any


LossFunction = Callable[[Any, Any], Tensor]


@dataclasses.dataclass
class Workload:
    """A model with adapters, batches to train and evaluate it on, and what to call the results.

    Attributes:
        name: of the model, for people.
        data: what it is trained on, for people.
        model: a ``peft.PeftModel`` in the clear, adapters fresh.
        train: batches in the order they are used.
        held_out: batches for evaluation.
        loss_fn: for ``LoraTrainer``; None where the model returns its loss.
        metric: name and function of an evaluation's result to show, from the trainer's metrics and the model.
        learning_rate: one that suits it.
        unit: what a batch is counted in.
    """

    name: str
    data: str
    model: nn.Module
    train: Sequence[Batch]
    held_out: Sequence[Batch]
    loss_fn: LossFunction | None
    metric: tuple[str, Callable[[nn.Module, Sequence[Batch], Mapping[str, float]], float]]
    learning_rate: float
    unit: str
