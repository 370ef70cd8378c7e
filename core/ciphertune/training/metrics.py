"""What is measured on held-out data beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MetricFunction = Callable[[nn.Module, Any], Mapping[str, Any]]
"""Called with the model, in evaluation mode, and the data of an evaluation; gives figures by name."""


class Metric(Protocol):
    """Figures of one evaluation. A new one is made for each."""

    def add(self, outputs: Any, batch: Any) -> None:
        """Take a batch into account: the model's outputs, and the batch (the targets, where it is a tuple)."""

    def result(self) -> dict[str, float]:
        """The figures by name; names begin with ``eval_``."""


class ClassificationMetric:
    """Accuracy and F1 of a classifier.

    ``eval_accuracy`` is the share of samples whose label has the largest logit. ``eval_f1`` is the mean over labels of
    the harmonic mean of precision and recall, each label counting the same (macro F1), and 0 for a label that is never
    found; labels that occur neither in the data nor in the answers are left out.

    Args:
        labels: number of labels.
    """

    def __init__(self, labels: int) -> None:
        self.labels = labels
        self._counts = torch.zeros(labels, labels, dtype=torch.int64)  # (label, answer)

    def add(self, outputs: Any, batch: Any) -> None:
        """Count answers: ``logits`` of shape (samples, labels), or a tensor of them, and ``labels`` of (samples,)."""
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
        wanted: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch
        pairs = wanted.detach().cpu() * self.labels + logits.detach().argmax(-1).cpu()
        self._counts += torch.bincount(pairs, minlength=self.labels**2).view(self.labels, self.labels)

    def result(self) -> dict[str, float]:
        """``eval_accuracy`` and ``eval_f1``, from 0 to 1."""
        right = self._counts.diagonal().double()
        occurring = (self._counts.sum(0) + self._counts.sum(1)).double()
        f1 = (2 * right / occurring)[occurring > 0]
        return {"eval_accuracy": float(right.sum() / self._counts.sum()), "eval_f1": float(f1.mean())}
