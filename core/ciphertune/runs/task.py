"""What a run does with a model and data, whichever task it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ciphertune.bundle.client import is_client_folder, load_client
from ciphertune.data.read import Data, read_data
from ciphertune.data.rows import Row
from ciphertune.errors import ConfigError
from ciphertune.runs.config import DataSection, TrainConfig
from ciphertune.training.metrics import Metric
from ciphertune.workloads.texts import language_reference

_BUILT_IN = "language-reference"


@dataclasses.dataclass(frozen=True)
class Batches:
    """The data of a run.

    Attributes:
        train: sequences to train on.
        held: sequences to evaluate with.
        collate: makes a batch of some of them.
        notes: what was done to them that a user should know.
    """

    train: Sequence[Any]
    held: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    notes: Sequence[str] = ()

    def loader(self, size: int, seed: int) -> DataLoader[Any]:
        """Batches of ``size`` sequences to train on, in an order drawn from a seed."""
        train: Any = self.train
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(train, batch_size=size, shuffle=True, generator=generator, collate_fn=self.collate)

    def evaluation(self, size: int) -> list[Any] | None:
        """Batches of ``size`` sequences to evaluate with; None where there are none."""
        return [self.collate(self.held[at : at + size]) for at in range(0, len(self.held), size)] or None


class RunTask(Protocol):
    """A task, with its data read, before the model is there."""

    @property
    def peft_task(self) -> str | None:
        """Type of the task that peft is told; None for none."""

    @property
    def metric(self) -> Callable[[], Metric] | None:
        """Makes what is measured beside the loss; None for nothing."""

    def load(self) -> tuple[Any, Any]:
        """Load the model and its tokenizer. Raises ``ConfigError`` where the model is none for the task."""

    def batches(self, tokenizer: Any) -> Batches:
        """The data as the model takes it. Raises ``ConfigError``."""

    def trained_whole(self) -> list[str]:
        """Names of modules that are trained whole, beside adapters."""


def read_source(data: DataSection, source: str) -> Data:
    """Read a source, built-in or as ``read_data`` reads it. Raises ``ConfigError``."""
    if source == _BUILT_IN:
        return Data([Row(name, {"text": text}) for name, text in language_reference().items()], prose=True)
    return read_data(source, files=data.files, split=data.split)


def load_bundle(config: TrainConfig) -> Any:
    """The model of a client's part of a bundle, None where ``model.name`` is no such folder. Raises ``ConfigError``."""
    model = config.model
    if not is_client_folder(model.name):
        if model.weights is not None:
            raise ConfigError(f"model.weights is for the client's part of a bundle, and {model.name} is none")
        return None
    if config.layers is not None:
        raise ConfigError("layers were chosen when the model was split: leave 'layers' out")
    if config.calibration is not None:
        raise ConfigError("the model was calibrated when it was split: leave 'calibration' out")
    return load_client(model.name, config.to, weights=model.weights)
