"""Models with adapters and data for the demo, the benchmarks and the tests; none needs a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError

Batch = Any
LossFunction = Callable[[Any, Any], Tensor]


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


def load_workload(name: str, *, batches: int, tokens: int, held_out: int, seed: int = 0, rank: int = 8) -> Workload:
    """Load a built-in workload.

    Args:
        name: ``smollm2`` or ``mlp``.
        batches: training batches.
        tokens: tokens (or samples) in a batch; of a language model a multiple of 256 is 256 a row.
        held_out: evaluation batches.
        seed: of the adapters' initial values and of the order of samples.
        rank: of the LoRA adapters.

    Raises:
        ConfigError: unknown, or a package it needs is missing; the message says what to install.
    """
    if name == "smollm2":
        from ciphertune.workloads.language import smollm2

        return smollm2(batches=batches, tokens=tokens, held_out=held_out, seed=seed, rank=rank)
    if name == "mlp":
        from ciphertune.workloads.digits import digits_mlp

        return digits_mlp(batches=batches, samples=tokens, held_out=held_out, seed=seed, rank=rank)
    raise ConfigError(f"unknown built-in model {name!r}; {closest(name, ['smollm2', 'mlp'])}")
