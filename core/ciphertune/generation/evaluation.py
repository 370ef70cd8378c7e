"""The loss on held-out data, read and cut as a training run reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ciphertune.data.render import IGNORED
from ciphertune.errors import ConfigError
from ciphertune.generation.opening import OpenedModel
from ciphertune.runs.config import DataSection, ModelSection, TrainConfig, TrainingSection
from ciphertune.runs.language import LanguageTask
from ciphertune.runs.task import Batches
from ciphertune.training.evaluation import evaluate


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What was measured on held-out data.

    Attributes:
        loss: mean over all tokens that are predicted, in nats.
        perplexity: its exponential.
        tokens: how many are predicted.
    """

    loss: float
    perplexity: float
    tokens: int


class HeldOutData:
    """Held-out data, read before the model is there.

    Args:
        data: the data of a run, whose held-out part is meant; of a source of its own all of it.
        whole: whether all of ``data.source`` is meant.

    Raises:
        ConfigError: it cannot be read, is no data for a language model, or nothing of it is held out.
    """

    def __init__(self, data: DataSection, *, whole: bool) -> None:
        self._whole = whole
        self._size = data.batch_size
        if whole:
            data = dataclasses.replace(data, held_out=0.0, eval_source=None)
        elif data.eval_source is None and data.held_out == 0:
            raise ConfigError("the run's file holds no data out for evaluation: name some by --data")
        self._length = data.length
        # Of a run, the task reads the data's section alone.
        self._task = LanguageTask(TrainConfig(ModelSection("any"), data, TrainingSection(output="any")))

    def measure(self, opened: OpenedModel) -> HeldOut:
        """Evaluate a model.

        Raises:
            ConfigError: the data does not fit the model. Nothing was sent.
            NonFiniteLossError: the loss is NaN or infinite.
        """
        if opened.positions is not None and self._length > opened.positions:
            raise ConfigError(f"sequences have {self._length} tokens, and the model takes {opened.positions} at most")
        batches = self._batches(opened.tokenizer)
        rows = batches.train if self._whole else batches.held
        if not rows:
            raise ConfigError("no sequence is held out for evaluation: name data by --data")
        most = max(max(row.ids) for row in rows)
        if most >= opened.vocabulary:
            raise ConfigError(
                f"the tokenizer gave token {most}, and {opened.source.name!r} has embeddings of {opened.vocabulary} "
                "tokens: they are not of one model"
            )
        tokens = sum(sum(label != IGNORED for label in row.labels[1:]) for row in rows)
        collated = [batches.collate(rows[at : at + self._size]) for at in range(0, len(rows), self._size)]
        found = evaluate(opened.model, collated, None)
        return HeldOut(found["eval_loss"], found["perplexity"], tokens)

    def _batches(self, tokenizer: Any) -> Batches:
        try:
            return self._task.batches(tokenizer)
        except ConfigError:
            if not self._whole or self._task.config.data.packing is not None:
                raise
        # Texts that fill no sequence when they are joined are sequences of their own.
        config = self._task.config
        self._task.config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
        return self._task.batches(tokenizer)
