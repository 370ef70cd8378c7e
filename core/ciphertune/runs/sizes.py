"""Sizes of batches: for evaluations, and a word on those for training that are too small."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from ciphertune._support.environment import memory
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import plugin_manager
from ciphertune.runs.results import Progress
from ciphertune.traffic import Exchange
from ciphertune.training.settings import TrainingSettings

_MOST_TOKENS = 2048
"""Of an evaluation's batch: beyond it, fixed costs of a product are too small to matter."""
_SHARE_OF_MEMORY = 0.25
_UNKNOWN_MEMORY = 1e9
_FLOAT = 4
_COPIES_OF_LOGITS = 4
_COPIES_OF_ACTIVATIONS = 16


def vocabulary(model: Any) -> int | None:
    """Tokens that a model of transformers has embeddings of; None for one without a table, as CANINE."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # transformers' way to say that there is none
        return None


def evaluation_size(held: Sequence[Any], model: Any, batch_size: int) -> int:
    """Sequences of an evaluation's batch: as many as memory allows up to 2048 tokens, and no fewer than in training.

    Args:
        held: sequences with ``ids``.
        model: of transformers.
        batch_size: sequences of a batch in training.
    """
    longest = max((len(sequence.ids) for sequence in held), default=1)
    config = model.config
    widest = max(int(getattr(config, name, None) or 0) for name in ("hidden_size", "intermediate_size"))
    logits = vocabulary(model) or 0
    per_token = _FLOAT * (_COPIES_OF_LOGITS * logits + _COPIES_OF_ACTIVATIONS * widest)
    available = memory()[1]
    room = _SHARE_OF_MEMORY * (_UNKNOWN_MEMORY if available is None else available * 1e9)
    return max(batch_size, int(min(_MOST_TOKENS, room / per_token)) // longest)


def steps_of(training: TrainingSettings, train: int, batch_size: int) -> int:
    """Optimizer steps of a run.

    Args:
        training: settings of the run.
        train: sequences to train on.
        batch_size: sequences of a batch.
    """
    return training.steps or training.epochs * _steps_per_epoch(training, train, batch_size)


def _steps_per_epoch(training: TrainingSettings, train: int, batch_size: int) -> int:
    return math.ceil(math.ceil(train / batch_size) / training.accumulation)


def evaluations_told(training: TrainingSettings, train: int, held: int, batch_size: int) -> str | None:
    """A line that says beforehand that evaluations will take more than the training; None where they will not.

    A sequence takes forward products in an evaluation, and as many backward ones again in training.

    Args:
        training: settings of the run.
        train: sequences to train on.
        held: sequences held out.
        batch_size: sequences of a batch in training.
    """
    per_epoch = _steps_per_epoch(training, train, batch_size)
    steps = steps_of(training, train, batch_size)
    every = training.eval_every or per_epoch
    times = math.ceil(steps / every) + training.eval_on_start
    trained = 2 * min(steps * training.accumulation * batch_size, math.ceil(steps / per_epoch) * train)
    ratio = times * held / trained
    if ratio <= 1:
        return None
    enough = max(1, int(held * 0.2 / ratio))
    return (
        f"{times} evaluations of {held} sequences will take about {ratio:.1f} times as long as the training itself: "
        f"evaluate less often (training.eval_every, now {every}), or hold out fewer (about {enough} are a fifth of the "
        "training's time)"
    )


@contextlib.contextmanager
def judging_batches(batch_size: int, progress: Progress) -> Iterator[None]:
    """Have ``SmallBatches`` watch the products within this context."""
    judge = SmallBatches(batch_size, progress)
    plugin_manager().register(judge)
    try:
        yield
    finally:
        plugin_manager().unregister(judge)


class SmallBatches:
    """Hook plugin that says once that fixed costs of products take most of a training step, with a better number.

    It compares forward products of a training step with those of the same layers in a larger batch of an evaluation,
    and takes the time of a product to grow by the same for every token.

    Args:
        batch_size: sequences of a batch in training.
        progress: called with the line.
    """

    def __init__(self, batch_size: int, progress: Progress) -> None:
        self._batch_size = batch_size
        self._progress = progress
        self._seconds: dict[int, dict[tuple[str, ...], list[float]]] = {}

    @hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        """Note how long a forward product took."""
        if exchange.direction == "forward":
            seconds = exchange.encrypt_seconds + exchange.wait_seconds + exchange.decrypt_seconds
            self._seconds.setdefault(exchange.tokens, {}).setdefault(exchange.layers, []).append(seconds)

    @hookimpl
    def ciphertune_training_step(self, step: int) -> None:
        """Judge after the second step: the first warms up."""
        if step != 2:
            return
        small, large = min(self._seconds, default=0), max(self._seconds, default=0)
        if large < 2 * small:
            return
        layers = self._seconds[small].keys() & self._seconds[large].keys()
        times = [sum(statistics.median(self._seconds[n][each]) for each in layers) for n in (small, large)]
        slope = (times[1] - times[0]) / (large - small)
        fixed = times[0] - slope * small
        if slope <= 0 or fixed <= times[0] / 2:
            return
        better = self._batch_size * math.ceil(min(16.0, 2 * fixed / slope / small))
        ratio = (fixed + slope * small * better / self._batch_size) / times[0]
        self._progress(
            f"Batches of {small} tokens are small: {100 * fixed / times[0]:.0f}% of the time of products does not "
            f"depend on their size. With data.batch_size = {better} a step takes about {ratio:.1f} times as long for "
            f"{better // self._batch_size} times the data"
        )
