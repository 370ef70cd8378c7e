"""The adapter that a run trains: checked before the model is loaded, then added to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ciphertune.bundle.client import is_client_folder
from ciphertune.errors import ConfigError
from ciphertune.runs.config import LoraSection, TrainConfig
from ciphertune.runs.task import RunTask
from ciphertune.training.lora import check_adapter, load_adapter
from ciphertune.training.tuners import add_tuner, check_tuner, learns_prompts, tuner_name

_DEFAULT_TARGETS = ("q_proj", "v_proj")


def check_adapters(config: TrainConfig) -> None:
    """Check what a configuration says of the adapter; no model is needed.

    Raises:
        ConfigError: it cannot be trained or loaded, or is said twice.
    """
    sections = [name for name, given in _sections(config).items() if given]
    if len(sections) > 1:
        first, second = sections[:2]
        if second == "model.adapter":
            raise ConfigError(
                f"{first} is for a new adapter, and model.adapter has its own settings: leave one of them out"
            )
        raise ConfigError(f"{first} and {second} are two adapters: leave one of them out")
    task = "SEQ_CLS" if config.task == "classification" else None
    if config.model.adapter is not None:
        if check_adapter(config.model.adapter, task) == "ADALORA":
            raise ConfigError(
                f"model.adapter: {config.model.adapter!r} is of AdaLoRA, whose ranks were divided when it was trained: "
                "it can be used, and not trained further"
            )
        return
    tuner, options, place = _chosen(config)
    bundle = is_client_folder(config.model.name)
    check_tuner(tuner, options, place, bundle=bundle, classification=task is not None)


def adapted(base: Any, config: TrainConfig, task: RunTask, steps: int) -> nn.Module:
    """The model with a new adapter, or with the one to go on with.

    Args:
        base: the model.
        config: of the run.
        task: what it is for.
        steps: optimizer steps of the run.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    if config.model.adapter is not None:
        return load_adapter(base, config.model.adapter, task.peft_task)
    tuner, options, place = _chosen(config)
    added: dict[str, Any] = {"task_type": task.peft_task}
    if learns_prompts(tuner):
        # peft puts prompts in front of the tokens of known tasks alone.
        added["task_type"] = task.peft_task or "CAUSAL_LM"
        _check_room(config, options, place, getattr(base.config, "max_position_embeddings", None))
    whole = [*options.get("modules_to_save", ()), *task.trained_whole()]
    if whole:
        added["modules_to_save"] = whole
    return add_tuner(base, tuner, {**options, **added}, seed=config.training.seed, place=place, steps=steps)


def adapted_layers(config: TrainConfig) -> tuple[str, ...]:
    """Ends of the names of layers with adapters, for a plan; one that is empty stands for all layers."""
    if config.tuner is None:
        targets: Any = config.lora.target_modules
    elif learns_prompts(tuner_name(config.tuner.name)):
        targets = "all"
    else:
        targets = config.tuner.options.get("target_modules")
    if isinstance(targets, str):  # all of them, or a pattern
        return ("",)
    return tuple(targets or _DEFAULT_TARGETS)


def first_adapted_block(config: TrainConfig) -> int:
    """Number of the first transformer block with adapters, for a plan: from 0."""
    options = config.lora.options if config.tuner is None else config.tuner.options
    blocks = options.get("layers_to_transform")
    return blocks if isinstance(blocks, int) else min(blocks or (0,))


def _sections(config: TrainConfig) -> dict[str, bool]:
    return {
        "[lora]": config.lora != LoraSection(),
        "[tuner]": config.tuner is not None,
        "model.adapter": config.model.adapter is not None,
    }


def _chosen(config: TrainConfig) -> tuple[str, Mapping[str, Any], str]:
    """Peft's name of the tuner, its options, and the place of these in the file."""
    if config.tuner is not None:
        return tuner_name(config.tuner.name), config.tuner.options, "tuner.options"
    lora = config.lora
    targets = lora.target_modules
    options = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, **lora.options}
    if targets is not None:
        options["target_modules"] = targets if isinstance(targets, str) else list(targets)
    return "LORA", options, "lora.options"


def _check_room(config: TrainConfig, options: Mapping[str, Any], place: str, most: Any) -> None:
    prompt = options.get("num_virtual_tokens", 0)
    if isinstance(most, int) and isinstance(prompt, int) and prompt + config.data.length > most:
        raise ConfigError(
            f"{place}.num_virtual_tokens and data.length are {prompt + config.data.length} tokens together, and the "
            f"model takes {most} at most: lower one of them"
        )
