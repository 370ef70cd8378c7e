"""Rows of each layer's product, found by a pass over inputs without values: of pictures, and of patches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune.errors import ConfigError
from ciphertune.outsourcing.trial import experts_without_values, fill_with_zeros, inputs_for


def rows_of_picture(model: nn.Module, names: Sequence[str], size: int | None) -> dict[str, float]:
    """Rows of layers' products for one picture.

    Args:
        model: of transformers, without weights.
        names: of the layers, which are linear or convolutions.
        size: pixels of each side; None for what the model's configuration says.

    Raises:
        ConfigError: the model takes no pictures, or not of this size.
    """
    inputs = _inputs(model)
    pixels = inputs.get("pixel_values")
    if pixels is None:
        raise ConfigError("pictures are planned for a model that takes pictures: leave --pictures out")
    if size is not None:
        inputs["pixel_values"] = pixels.new_zeros(*pixels.shape[:-2], size, size)
    return _rows(model, names, inputs, len(pixels), f"pictures of {inputs['pixel_values'].shape[-1]} pixels each way")


def rows_of_token(model: nn.Module, names: Sequence[str], length: int) -> dict[str, float]:
    """Rows of layers' products for one token of sequences of ``length``. Raises ``ConfigError``, as for pictures."""
    inputs = _inputs(model)
    if "input_ids" not in inputs:
        raise ConfigError("this model reads no tokens: say by --pictures how many pictures a step has")
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            inputs[name] = inputs[name].new_zeros(2, length)
    return _rows(model, names, inputs, 2 * length, f"sequences of {length} tokens")


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    if not hasattr(model, "config"):
        raise ConfigError(f"rows of a {type(model).__name__}, which is no model of transformers, cannot be planned")
    return inputs_for(model, torch.device("meta"))


def _rows(model: nn.Module, names: Sequence[str], inputs: dict[str, Tensor], each: int, what: str) -> dict[str, float]:
    kind: Any = type(model)
    with torch.device("meta"):  # Buffers, too, which the skeleton holds.
        trial = kind(copy.deepcopy(model.config)).eval()
    experts_without_values(trial)
    found: dict[str, float] = {}
    for name in names:
        module = trial.get_submodule(name)

        def note(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
            features = getattr(module, "out_channels", None) or output.shape[-1]
            found[name] = found.get(name, 0.0) + math.prod(output.shape) / features / each

        module.register_forward_hook(note)
    try:
        try:
            _run(trial, inputs)
        except Exception:  # Control flow that depends on values.
            found.clear()
            fill_with_zeros(trial)
            _run(trial, {name: torch.zeros_like(value, device="cpu") for name, value in inputs.items()})
    except Exception as error:
        raise ConfigError(
            f"{kind.__name__} does not compute {what}, so that rows of its layers are not known: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise ConfigError(f"{missing} is not reached by {what}, so its rows are not known: leave it out")
    return found


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    device = next(iter(inputs.values())).device
    with torch.no_grad(), torch.random.fork_rng(devices=[]), device:
        model(**inputs)
