"""The task of classification: one of a few labels for a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ciphertune.bundle.client import is_client_folder
from ciphertune.data.labels import LabelCollator, label_names, labelled, tokens_of
from ciphertune.data.sequences import padding
from ciphertune.data.splitting import split_by
from ciphertune.errors import ConfigError
from ciphertune.models.load import known_labels, labels_in, load_classifier, load_tokenizer
from ciphertune.runs.config import TrainConfig
from ciphertune.runs.task import Batches, load_bundle, read_source
from ciphertune.training.metrics import ClassificationMetric, Metric


class ClassificationTask:
    """Reads the data, and says what is wrong with it before the model is loaded.

    Args:
        config: of the run.

    Attributes:
        names: of the labels, in the order of their numbers.

    Raises:
        ConfigError: the data cannot be read, or has no labels.
    """

    peft_task = "SEQ_CLS"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        data = config.data
        for key in ("prompt_field", "completion_field", "packing", "completion_only_loss", "chat_template_path"):
            if getattr(data, key) is not None:
                raise ConfigError(f'data.{key} is for language models: leave it out, or set task = "language"')
        if data.assistant_only_loss:
            raise ConfigError("data.assistant_only_loss is for language models: leave it out")
        read = read_source(data, data.source)
        if read.prose:
            raise ConfigError(
                f"data.source {data.source!r} holds texts without labels: for classification, give rows with a text "
                "and a label (.csv, .jsonl, .parquet), and name their columns in data.text_field and data.label_field"
            )
        self.examples = labelled(read.rows, data.text_field, data.label_field)
        self.held = []
        if data.eval_source is not None:
            self.held = labelled(read_source(data, data.eval_source).rows, data.text_field, data.label_field)
        self.names = label_names([*self.examples, *self.held], data.labels)
        if data.eval_source is None:
            self.examples, self.held = split_by(self.examples, [e.label for e in self.examples], data.held_out)
        untaught = {e.label for e in self.held} - {e.label for e in self.examples}
        if untaught:
            raise ConfigError(
                f"{len(untaught)} labels are in data.eval_source and never in data.source: add rows of them"
            )
        model = config.model
        if model.adapter is not None and Path(model.adapter, "config.json").is_file():
            self.names = _ordered(self.names, known_labels(model.adapter), model.adapter)
        elif not is_client_folder(model.name):
            self.names = _ordered(self.names, known_labels(model.name, model.gguf_file), model.name)
        self._new: list[str] = []

    @property
    def metric(self) -> Callable[[], Metric]:
        """Accuracy and F1."""
        return lambda: ClassificationMetric(len(self.names))

    def load(self) -> tuple[Any, Any]:
        """A model with a head that classifies, in float32, and the tokenizer. Raises ``ConfigError``."""
        model = self.config.model
        base = load_bundle(self.config)
        if base is None:
            torch.manual_seed(self.config.training.seed)  # the head is drawn
            base, tokenizer, self._new = load_classifier(model.name, self.names, model.gguf_file)
        else:
            known = labels_in(base.config)
            if known is None:
                raise ConfigError(
                    f"{model.name!r} is of a {type(base).__name__}, which has no head that classifies: load one with "
                    "AutoModelForSequenceClassification, with your labels, save it, and split that"
                )
            if model.adapter is None:
                self.names = _ordered(self.names, known, model.name)
            tokenizer = load_tokenizer(model.name)
        # By it, a decoder finds the last token of a text.
        base.config.pad_token_id = padding(tokenizer)
        return base, tokenizer

    def trained_whole(self) -> list[str]:
        """The modules whose weights are new, without the heads that peft trains whole by itself."""
        return [name for name in self._new if name not in ("classifier", "score")]

    def batches(self, tokenizer: Any) -> Batches:
        """Texts with the numbers of their labels. Raises ``ConfigError``."""
        data = self.config.data
        train, cut = tokens_of(self.examples, self.names, tokenizer, data.length)
        held, cut_too = tokens_of(self.held, self.names, tokenizer, data.length)
        notes = [f"{len(self.examples) + len(self.held)} texts with {len(self.names)} labels: {', '.join(self.names)}"]
        told = {"to train on: ": cut.told(data.length), "held out: ": cut_too.told(data.length)}
        notes += [name + text for name, text in told.items() if text]
        return Batches(train, held, LabelCollator(padding(tokenizer), data.pad_to_multiple_of), notes)


def _ordered(names: tuple[str, ...], known: tuple[str, ...] | None, model: str) -> tuple[str, ...]:
    """The labels in the order of a model that tells some apart already."""
    if known is None or names == known:
        return names
    if set(names) <= set(known):
        return known
    nameless = all(name == f"LABEL_{number}" for number, name in enumerate(known))
    if nameless and len(known) == len(names):
        return names
    raise ConfigError(
        f"{model!r} tells {', '.join(known[:8])} apart, and the data has {', '.join(names[:8])}: use its names in the "
        "data, or take the model that it was made of"
    )
