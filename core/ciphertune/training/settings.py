"""The settings of a training run, checked in one place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypedDict

from ciphertune._support.ranges import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, check_fields
from ciphertune.errors import TrainingError

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of ``LoraTrainer`` and of the ``[training]`` section of a configuration file.

    Attributes:
        learning_rate: learning rate of AdamW, the optimizer that is made where none is given.
        weight_decay: weight decay of AdamW.
        schedule: learning rate over the run: ``constant``, ``linear`` down to 0, or ``cosine``, which rises for the
            first tenth of the steps, or for ``warmup_steps``, and then falls to almost 0.
        warmup_steps: optimizer steps over which the learning rate rises to its full value, before the schedule begins;
            below 1, their share of all steps.
        epochs: passes over the data.
        steps: optimizer steps to train for, however many epochs that takes; decides instead of ``epochs``.
        accumulation: micro-batches per optimizer step, each with the same weight. The last step of an epoch averages
            over the micro-batches that are left.
        interleave: micro-batches of a step that are under way at once, from 1 to ``accumulation``: while one waits for
            a worker, another is computed. Losses and gradients are the same but for dropout, where each micro-batch
            draws from a random stream of its own. Memory grows with it, as with larger batches.
        frozen_cache: megabytes on the client's disk for what the blocks below the first adapter give, encrypted; 0 for
            none. Epochs after the first then compute and send nothing for these blocks. Refused where the blocks give
            something else every time.
        max_grad_norm: Euclidean norm that gradients are scaled down to; None to leave them.
        gradient_norms: whether to keep the norm of every trainable parameter's gradient in the history, of every step.
        eval_every: optimizer steps between evaluations; by default there is one at the end of each epoch.
        eval_on_start: whether to evaluate before the first step, too.
        checkpoint_dir: directory for checkpoints; None for none.
        checkpoint_every: optimizer steps between checkpoints; by default there is one at the end of each epoch. The
            end of training always has one.
        keep_checkpoints: number of the latest checkpoints to keep; None for all.

    Raises:
        TrainingError: a value has the wrong type or is out of its range.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup_steps: float = 0.0
    epochs: int = 1
    steps: int | None = None
    accumulation: int = 1
    interleave: int = 1
    frozen_cache: int = 0
    max_grad_norm: float | None = 1.0
    gradient_norms: bool = False
    eval_every: int | None = None
    eval_on_start: bool = False
    checkpoint_dir: str | Path | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int | None = 2

    def __post_init__(self) -> None:
        check_fields(
            self,
            TrainingError,
            learning_rate=POSITIVE,
            weight_decay=NOT_NEGATIVE,
            warmup_steps=NOT_NEGATIVE,
            epochs=AT_LEAST_ONE,
            steps=AT_LEAST_ONE,
            accumulation=AT_LEAST_ONE,
            interleave=AT_LEAST_ONE,
            frozen_cache=NOT_NEGATIVE,
            max_grad_norm=ABOVE_ZERO,
            eval_every=AT_LEAST_ONE,
            checkpoint_every=AT_LEAST_ONE,
            keep_checkpoints=AT_LEAST_ONE,
        )
        if self.warmup_steps > 1 and not self.warmup_steps.is_integer():
            raise TrainingError(f"warmup_steps must be a whole number, or below 1 a share, not {self.warmup_steps}")
        if self.interleave > self.accumulation:
            raise TrainingError(
                f"interleave must be from 1 to accumulation, which is {self.accumulation}, not {self.interleave}: "
                "a step has no more micro-batches"
            )
        if self.checkpoint_every is not None and self.checkpoint_dir is None:
            raise TrainingError("checkpoint_every is set but checkpoint_dir is not: say where to write checkpoints")

    def compared_at_resume(self, *, own_optimizer: bool) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes, by name.

        The others may change: how long to train, and when to evaluate and to write checkpoints.

        Args:
            own_optimizer: whether the optimizer is made from these settings.
        """
        names = ["accumulation", "max_grad_norm"]
        if self.interleave > 1:  # the number of random streams that dropout draws from
            names.append("interleave")
        if own_optimizer:
            names += ["learning_rate", "weight_decay"]
        return {name: getattr(self, name) for name in names}


class SettingsArguments(TypedDict, total=False):
    """The attributes of ``TrainingSettings`` as keyword arguments; a test holds the two equal."""

    learning_rate: float
    weight_decay: float
    schedule: Schedule
    warmup_steps: float
    epochs: int
    steps: int | None
    accumulation: int
    interleave: int
    frozen_cache: int
    max_grad_norm: float | None
    gradient_norms: bool
    eval_every: int | None
    eval_on_start: bool
    checkpoint_dir: str | Path | None
    checkpoint_every: int | None
    keep_checkpoints: int | None
