"""Whether a model predicts each token from those before it alone."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ciphertune.errors import ConfigError


def refuse_encoder(model: Any, name: str, *, outsourced: bool = False) -> None:
    """Raise ``ConfigError`` for a language model whose tokens see those behind them.

    Its loss of predicting the next token would fall, since that token is among its inputs, and mean nothing.

    Args:
        model: of transformers.
        name: of the model, for the message.
        outsourced: whether its layers are at workers, who are then asked nothing.
    """
    flags = [flag for module in model.modules() if isinstance(flag := getattr(module, "is_causal", None), bool)]
    if (flags and not any(flags)) or (not flags and not outsourced and _sees_ahead(model)):
        raise ConfigError(
            f"{name!r} is an encoder: in {type(model).__name__} each token sees those behind it, so it cannot be "
            "trained to predict the next one. 'train' takes causal language models (Llama, Qwen, Mistral, GPT-2, …); "
            "an encoder with a task's head can be trained from Python, with ciphertune.outsource and LoraTrainer"
        )


def _sees_ahead(model: Any) -> bool:
    """Whether another last token changes what the model says of the first; False where it cannot be asked."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), contextlib.suppress(Exception):
            one, other = (model(input_ids=torch.tensor([[1, 2, last]], device=model.device)).logits for last in (1, 2))
            difference = (one[0, 0] - other[0, 0]).norm()
            return bool(difference > 1e-3 * one[0, 0].norm())
    finally:
        model.train(training)
    return False
