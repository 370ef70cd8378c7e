"""A training run described by a TOML file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ciphertune._support.options import build_section
from ciphertune._support.ranges import AT_LEAST_ONE, AT_LEAST_TWO, BELOW_ONE, NOT_EMPTY, POSITIVE, check_fields
from ciphertune.errors import ConfigError
from ciphertune.plugins.manager import anchored
from ciphertune.training.settings import TrainingSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Task = Literal["language", "classification"]
_TRL_NAMES = {"max_length": "length", "dataset_text_field": "text_field"}
"""Keys of ``[data]`` by the names that TRL has for them."""
_LORA_NAMES = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
"""Keys of ``[lora]`` by the names that peft has for them."""


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """``[model]``.

    Attributes:
        name: a folder or hub name for transformers, or the built-in ``smollm2``.
        gguf_file: file within the folder, for models in GGUF form.
        weights: for the client's part of a bundle: a worker's folder to read codes in, where an encryption prepares
            itself from them; the workers are asked if not given.
        adapter: a folder with an adapter of the model to train further, in place of a new one as in ``[lora]``.
    """

    name: str
    gguf_file: str | None = None
    weights: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, name=NOT_EMPTY)


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """``[lora]``: as in ``peft.LoraConfig``.

    Attributes:
        r: rank of the adapters.
        alpha: scale of the adapters, divided by the rank.
        dropout: probability of dropping an adapter's input, in training.
        target_modules: names of the layers that get adapters, or ``all-linear``; if not given, those that peft takes
            for the model's architecture, ``["q_proj", "v_proj"]`` for most.
        options: any other option of ``peft.LoraConfig`` by its name there, such as ``{use_rslora = true}``.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, r=AT_LEAST_ONE, alpha=POSITIVE, dropout=BELOW_ONE, target_modules=NOT_EMPTY)
        for theirs, ours in _LORA_NAMES.items():
            if theirs in self.options:
                raise ConfigError(f"options.{theirs} is lora.{ours} here: set that")


@dataclasses.dataclass(frozen=True)
class TunerSection:
    """``[tuner]``: another tuner of peft in place of LoRA.

    Attributes:
        name: peft's name of it, such as ``ia3`` or ``prefix-tuning``.
        options: for its configuration, by peft's own names, such as ``{target_modules = ["k_proj", "v_proj"]}``; each
            has peft's default if not given.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name.strip().lower() == "lora":
            raise ConfigError("name: LoRA has a section of its own, [lora], with further options in lora.options")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """``[data]``. Keys of TRL's ``SFTConfig`` mean what they mean there.

    Attributes:
        source: a text file; a file of rows with named fields (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``,
            ``.parquet``, ``.arrow``); either compressed (``.gz``, ``.bz2``, ``.xz``); a folder of the one or the other;
            a folder that ``datasets`` saved; ``hub:owner/name``, which is fetched; or the built-in
            ``language-reference``.
        files: pattern of the files to read in a folder, such as ``*.jsonl``, where it holds others too.
        split: split to read of a data set that has several.
        eval_source: like ``source``, to evaluate with, in place of a share of it.
        text_field: column that holds the text, where it is not ``text``. TRL's ``dataset_text_field``.
        prompt_field: column that holds the question, for ``prompt`` or a name of your own.
        completion_field: column that holds the answer, for ``completion`` or a name of your own.
        label_field: column that holds the label, for classification.
        labels: names of all labels in the order of their numbers, for classification; those that occur if not given.
        length: tokens of a sequence at most. TRL's ``max_length``.
        batch_size: sequences of one micro-batch.
        held_out: share of the rows, or of a single text's sequences, that is kept for evaluation; 0 for none.
        packing: whether examples are joined, and cut into sequences of ``length`` tokens; else each is a sequence of
            its own, cut at its end if it is longer. If not given, texts are joined and anything else is not.
        completion_only_loss: whether prompts are left out of the loss; if not given, they are.
        assistant_only_loss: whether, of conversations, the assistant's turns alone count for the loss.
        chat_template_path: a Jinja file with a chat template, in place of the tokenizer's.
        pad_to_multiple_of: pad batches to a multiple of so many tokens, which hides the exact number.
    """

    source: str
    files: str | None = None
    split: str = "train"
    eval_source: str | None = None
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] | None = None
    length: int = 256
    batch_size: int = 4
    held_out: float = 0.1
    packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template_path: str | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            ConfigError,
            source=NOT_EMPTY,
            length=AT_LEAST_TWO,
            batch_size=AT_LEAST_ONE,
            held_out=BELOW_ONE,
            pad_to_multiple_of=AT_LEAST_ONE,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSection(TrainingSettings):
    """``[training]``: the attributes of ``TrainingSettings``, and these.

    Attributes:
        output: folder for the adapter, ``result.json``, the report and the loss plot.
        seed: seed of the adapters and of the order of batches.
        eval_on_start: whether to evaluate before the first step, too.
    """

    output: str
    seed: int = 0
    eval_on_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ConfigError, output=NOT_EMPTY)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A configuration file; what is no section stands before the sections.

    Attributes:
        task: ``language`` teaches a language model texts, conversations, or answers to prompts, whichever the data
            holds; ``classification`` teaches a model to put one of a few labels on a text.
        to: selection string.
        layers: names or patterns of the layers to outsource, or ``["all"]`` for all with the output head; the default
            choice if not given.
        embeddings: whether the token embedding is at the workers, too, and tokens are looked up under encryption.
        convolutions: whether convolutions that save more than they cost are at the workers, too, as patches; or names
            or patterns of those that are.
        calibration: a file with public text to find channels with outliers by, which stay at the client; the Python
            language reference if not given, and ``off`` for none. A bundle was calibrated when it was split.
        plugins: hook plugins to use, each ``name[?option=value&…]``.
    """

    model: ModelSection
    data: DataSection
    training: TrainingSection
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)
    tuner: TunerSection | None = None
    task: Task = "language"
    to: str = "mlwe"
    layers: tuple[str, ...] | None = None
    embeddings: bool = False
    convolutions: bool | tuple[str, ...] = False
    calibration: str | None = None
    plugins: tuple[str, ...] = ()


def load_config(path: Path) -> TrainConfig:
    """Read a file; paths in it are relative to the file.

    Raises:
        ConfigError: it cannot be read, or a section or key is unknown, missing, or of the wrong type.
        SelectionError, PluginError: about ``plugins``.
    """
    text = read_text(path)
    try:
        content = tomllib.loads(text)
    except ValueError as error:  # not TOML, or a number of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return placed(parse_config(content), path.parent)


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises ``ConfigError``."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def placed(config: TrainConfig, folder: Path) -> TrainConfig:
    """A configuration whose paths were relative to a folder. Raises ``SelectionError``, ``PluginError``."""
    model, data, training = config.model, config.data, config.training
    return dataclasses.replace(
        config,
        plugins=tuple(anchored(text, folder) for text in config.plugins),
        calibration=None if config.calibration is None else _beside(folder, config.calibration),
        model=dataclasses.replace(model, name=_beside(folder, model.name), adapter=_below(folder, model.adapter)),
        data=dataclasses.replace(
            data,
            source=_beside(folder, data.source),
            eval_source=None if data.eval_source is None else _beside(folder, data.eval_source),
            chat_template_path=_below(folder, data.chat_template_path),
        ),
        training=dataclasses.replace(
            training,
            output=str(_below(folder, training.output)),
            checkpoint_dir=_below(folder, training.checkpoint_dir),
        ),
    )


def parse_config(content: Mapping[str, Any]) -> TrainConfig:
    """Check and convert a parsed file.

    Raises:
        ConfigError: a section or key is unknown, missing, of the wrong type or out of its range.
    """
    data = content.get("data")
    if isinstance(data, Mapping):
        for theirs, ours in _TRL_NAMES.items():
            if theirs in data and ours in data:
                raise ConfigError(f"data.{theirs} and data.{ours} are two names of one setting: leave one out")
        content = {**content, "data": {_TRL_NAMES.get(name, name): value for name, value in data.items()}}
    return build_section(TrainConfig, content)


def _below(folder: Path, path: str | Path | None) -> str | None:
    return None if path is None else str(folder / Path(path).expanduser())


def _beside(folder: Path, text: str) -> str:
    """The path below ``folder`` where it exists, else the text, which is a built-in or a hub name."""
    path = folder / Path(text).expanduser()
    return str(path) if path.exists() else text
