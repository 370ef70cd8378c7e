"""Adapters by peft: new ones of LoRA, and one of any tuner to go on with or to use."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ciphertune._support.optional_imports import import_optional
from ciphertune.checkpoints.files import open_tensors
from ciphertune.errors import ConfigError
from ciphertune.training.tuners import EXTRA, add_tuner, learns_prompts, peft_errors, refusal, tuner_name


def add_lora(
    model: nn.Module, *, seed: int, rank: int, targets: Sequence[str] | str | None, **options: Any
) -> nn.Module:
    """Add LoRA adapters to a model with peft, initialised from a seed.

    Args:
        model: in the clear or outsourced.
        seed: of the initial values.
        rank: of the adapters.
        targets: names of layers, a pattern that peft takes, ``all-linear``, or None for the layers that peft gives
            adapters to in this architecture: all linear ones where it has no opinion.
        options: for ``peft.LoraConfig``.

    Raises:
        ConfigError: a name in ``targets`` is of no layer that could have an adapter, or peft refuses one.
    """
    return add_tuner(model, "LORA", {"r": rank, "target_modules": targets, **options}, seed=seed, place="lora")


def load_adapter(model: nn.Module, folder: str, task: str | None) -> nn.Module:
    """Put an adapter on a model, to train it further or to use it.

    Args:
        model: that the adapter was trained for, in the clear or outsourced.
        folder: as peft saves it. Nothing is looked for outside of this machine.
        task: peft's type of the task that the adapter must be of, None for a language model.

    Raises:
        ConfigError: there is none, it is of another model or task, or of a tuner that cannot be loaded here.
    """
    check_adapter(folder, task)
    peft = import_optional("peft", EXTRA)
    with peft_errors(f"model.adapter {folder!r}"), warnings.catch_warnings():
        # Tensors that are missing in the file would be fresh ones, and only warned about.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        adapted: nn.Module = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    return adapted


def check_adapter(folder: str, task: str | None) -> str:
    """Check what an adapter's folder says of it; the model is not needed. Raises ``ConfigError``.

    Returns:
        peft's name of its tuner.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        kind, of = stated["peft_type"], stated.get("task_type")
    except OSError as error:
        raise ConfigError(
            f"model.adapter: cannot read {path}: {error.strerror}. A folder with an adapter of peft is expected"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model.adapter: {path} is damaged, or not of an adapter of peft") from error
    try:
        tuner = tuner_name(str(kind))
    except ConfigError:
        raise ConfigError(f"model.adapter: {folder!r} is of {kind}, which the installed peft does not know") from None
    why = refusal(tuner, bundle=False)
    if learns_prompts(tuner):
        why = "its prompt is in front of the tokens and not within the layers: use it with peft's own PeftModel"
    if why is not None:
        raise ConfigError(f"model.adapter: {folder!r} is of {tuner}, which cannot be loaded here: {why}")
    language = (None, "CAUSAL_LM")
    if (of not in language) if task is None else (of != task):
        raise ConfigError(
            f"model.adapter: {folder!r} was trained for the task {of or 'of a language model'}, and this run is for "
            f"{task or 'a language model'}: see 'task' in the configuration"
        )
    weights = Path(folder) / "adapter_model.safetensors"
    if weights.is_file():
        open_tensors(weights)
    elif not weights.with_suffix(".bin").is_file():
        raise ConfigError(f"model.adapter: {folder!r} holds no adapter_model.safetensors")
    return tuner
