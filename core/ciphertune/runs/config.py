"""A training run described by a TOML file."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from ciphertune._support.options import required
from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError
from ciphertune.plugins.manager import anchored

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SectionT = TypeVar("SectionT")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """``[model]``.

    Attributes:
        name: a folder or hub name for transformers, or the built-in ``smollm2``.
        gguf_file: file within the folder, for models in GGUF form.
    """

    name: str
    gguf_file: str | None = None


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """``[lora]``: as in ``peft.LoraConfig``."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """``[data]``.

    Attributes:
        source: a text file, a folder of ``.txt`` and ``.md`` files, a ``.jsonl`` or ``.ndjson`` file with one object a
            line, or the built-in ``language-reference``.
        text_field: of the objects of such a file.
        length: tokens of one sequence.
        batch_size: sequences of one micro-batch.
        held_out: share of the texts, or of a single text's sequences, that is kept for evaluation; 0 for none.
    """

    source: str
    text_field: str = "text"
    length: int = 256
    batch_size: int = 4
    held_out: float = 0.1


@dataclasses.dataclass(frozen=True)
class TrainingSection:
    """``[training]``: as in ``LoraTrainer``, with where to put the results.

    Attributes:
        output: folder for the adapter, the history and the loss plot.
        schedule: learning rate over the run.
        seed: of adapters and the order of batches.
    """

    output: str
    steps: int | None = None
    epochs: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    accumulation: int = 1
    interleave: int = 1
    max_grad_norm: float | None = 1.0
    seed: int = 0
    eval_every: int | None = None
    checkpoint_dir: str | None = None
    checkpoint_every: int | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole file. ``to``, ``layers`` and ``plugins`` stand before the sections.

    Attributes:
        to: selection string.
        layers: names or patterns of the layers to outsource; the default choice if not given.
        plugins: hook plugins to use, each ``name[?option=value&…]``.
    """

    model: ModelSection
    data: DataSection
    training: TrainingSection
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)
    to: str = "mlwe"
    layers: tuple[str, ...] | None = None
    plugins: tuple[str, ...] = ()


def load_config(path: Path) -> TrainConfig:
    """Read a file; paths in it are relative to the file.

    Raises:
        ConfigError: it cannot be read, or a section or key is unknown, missing, or of the wrong type.
        SelectionError, PluginError: about ``plugins``.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}") from error
    config = parse_config(content)
    folder = path.parent
    return dataclasses.replace(
        config,
        plugins=tuple(anchored(text, folder) for text in config.plugins),
        model=dataclasses.replace(config.model, name=_beside(folder, config.model.name)),
        data=dataclasses.replace(config.data, source=_beside(folder, config.data.source)),
        training=dataclasses.replace(
            config.training,
            output=str(folder / config.training.output),
            checkpoint_dir=None
            if config.training.checkpoint_dir is None
            else str(folder / config.training.checkpoint_dir),
        ),
    )


def parse_config(content: Mapping[str, Any]) -> TrainConfig:
    """Check and convert a parsed file. Raises ``ConfigError``."""
    config = _build(TrainConfig, content, "")
    t = config.training
    # All before a model is loaded, which may take minutes.
    checks = [
        ("lora.r", config.lora.r >= 1, "1 or more"),
        ("lora.alpha", 0 < config.lora.alpha < math.inf, "a finite number above 0"),
        ("lora.dropout", 0 <= config.lora.dropout < 1, "from 0 to below 1"),
        ("lora.target_modules", len(config.lora.target_modules) > 0, "one name or more"),
        ("data.length", config.data.length >= 2, "2 or more"),
        ("data.batch_size", config.data.batch_size >= 1, "1 or more"),
        ("data.held_out", 0 <= config.data.held_out < 1, "from 0 to below 1"),
        ("training.steps", t.steps is None or t.steps >= 1, "1 or more"),
        ("training.epochs", t.epochs >= 1, "1 or more"),
        ("training.learning_rate", 0 < t.learning_rate < math.inf, "a finite number above 0"),
        ("training.weight_decay", 0 <= t.weight_decay < math.inf, "a finite number from 0"),
        ("training.accumulation", t.accumulation >= 1, "1 or more"),
        ("training.interleave", 1 <= t.interleave <= t.accumulation, "from 1 to training.accumulation"),
        ("training.max_grad_norm", t.max_grad_norm is None or t.max_grad_norm > 0, "above 0"),
        ("training.eval_every", t.eval_every is None or t.eval_every >= 1, "1 or more"),
        ("training.checkpoint_every", t.checkpoint_every is None or t.checkpoint_every >= 1, "1 or more"),
    ]
    for name, right, expected in checks:
        if not right:
            raise ConfigError(f"{name} must be {expected}")
    if t.checkpoint_every is not None and t.checkpoint_dir is None:
        raise ConfigError("training.checkpoint_every is set but training.checkpoint_dir is not")
    return config


def _beside(folder: Path, text: str) -> str:
    """A path relative to the file where something is there, else the text: a built-in or a hub name."""
    return str(folder / text) if (folder / text).exists() else text


def _build(cls: type[SectionT], content: Any, where: str) -> SectionT:
    if not isinstance(content, Mapping):
        raise ConfigError(f"[{where}] must be a section")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in content:
        if name not in hints:
            raise ConfigError(
                f"unknown {'key' if where else 'key or section'} {prefix + name!r}; {closest(name, hints)}"
            )
    values = {name: _value(value, hints[name], prefix + name) for name, value in content.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if required(field) and field.name not in values:
            raise ConfigError(f"{prefix}{field.name} is missing")
    return cls(**values)


def _value(value: Any, hint: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)  # type: ignore[arg-type]
    if typing.get_origin(hint) is types.UnionType:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        raise ConfigError(f"{name} must be a list of strings, not {value!r}")
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{name} is too large a number") from error
    if type(value) is not hint:
        raise ConfigError(f"{name} must be of type {hint.__name__}, not {type(value).__name__}")
    return value
