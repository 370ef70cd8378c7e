"""A model with adapters and the batches to train it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ciphertune.training.batches import LossFunction

Batch = Any


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to a language model.

    Attributes:
        text: the question.
        ask: answers it with a model, greedily.
    """

    text: str
    ask: Callable[[nn.Module], str]


@dataclasses.dataclass
class Workload:
    """A model with adapters, batches to train and evaluate it on, and names for the results.

    Attributes:
        name: display name of the model.
        data: description of the data.
        model: a ``peft.PeftModel`` in the clear, adapters fresh.
        train: batches in the order they are used.
        held_out: batches for evaluation.
        loss_fn: for ``LoraTrainer``; None where the model returns its loss.
        metric: name and function of an evaluation's result to show, from the trainer's metrics and the model.
        learning_rate: suitable for the model.
        unit: ``tokens`` or ``samples``.
        question: to ask before and after; None where the model does not answer.
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
    question: Question | None = None
