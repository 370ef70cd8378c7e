"""Inference with a model that is being trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ciphertune._support.denormals import flushing
from ciphertune.training import adapter


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and no gradients within a ``with`` block; each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with flushing(), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class InferenceModel(nn.Module):
    """A model for inference only: each call runs in evaluation mode, adapters on, without gradients.

    Afterwards modes are as they were, and adapters that were off are off again.

    Attributes of the model are reached through it. Its own ``train`` does nothing.

    Args:
        model: the model, shared and not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs."""
        with evaluating(self.model), adapter.enabled(self.model):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``."""
        with evaluating(self.model), adapter.enabled(self.model):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def train(self, mode: bool = True) -> InferenceModel:
        """Leave the mode as it is: it belongs to the training loop."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
