"""A training run described by a TOML file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ciphertune._support.options import build_section
from ciphertune._support.ranges import AT_LEAST_ONE, AT_LEAST_TWO, BELOW_ONE, NOT_EMPTY, POSITIVE, check_fields
from ciphertune.errors import ConfigError
from ciphertune.plugins.manager import anchored
from ciphertune.training.settings import TrainingSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """``[model]``.

    Attributes:
        name: a folder or hub name for transformers, or the built-in ``smollm2``.
        gguf_file: file within the folder, for models in GGUF form.
        weights: for the client's part of a bundle: a worker's folder to read codes in, where an encryption prepares
            itself from them; the workers are asked if not given.
    """

    name: str
    gguf_file: str | None = None
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """``[lora]``: as in ``peft.LoraConfig``.

    Attributes:
        r: rank of the adapters.
        alpha: scale of the adapters, divided by the rank.
        dropout: probability of dropping an adapter's input, in training.
        target_modules: names of the layers that get adapters.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, r=AT_LEAST_ONE, alpha=POSITIVE, dropout=BELOW_ONE, target_modules=NOT_EMPTY)


@dataclasses.dataclass(frozen=True)
class DataSection:
    """``[data]``.

    Attributes:
        source: a text file, a folder of ``.txt`` and ``.md`` files, a ``.jsonl`` or ``.ndjson`` file with one object a
            line, or the built-in ``language-reference``.
        text_field: field of the objects of such a file that holds the text.
        length: tokens of one sequence.
        batch_size: sequences of one micro-batch.
        held_out: share of the texts, or of a single text's sequences, that is kept for evaluation; 0 for none.
    """

    source: str
    text_field: str = "text"
    length: int = 256
    batch_size: int = 4
    held_out: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, length=AT_LEAST_TWO, batch_size=AT_LEAST_ONE, held_out=BELOW_ONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSection(TrainingSettings):
    """``[training]``: the attributes of ``TrainingSettings``, and these.

    Attributes:
        output: folder for the adapter, ``result.json``, the report and the loss plot.
        seed: seed of the adapters and of the order of batches.
    """

    output: str
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A configuration file. ``to``, ``layers`` and ``plugins`` stand before the sections.

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
    """Check and convert a parsed file.

    Raises:
        ConfigError: a section or key is unknown, missing, of the wrong type or out of its range.
    """
    return build_section(TrainConfig, content)


def _beside(folder: Path, text: str) -> str:
    """The path below ``folder`` where it exists, else the text, which is a built-in or a hub name."""
    return str(folder / text) if (folder / text).exists() else text
