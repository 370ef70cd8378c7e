"""Rows that the ``datasets`` library reads: Parquet and Arrow files, saved data sets, and those of the hub."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ciphertune._support.optional_imports import import_optional
from ciphertune.data.files import form
from ciphertune.data.rows import Row
from ciphertune.errors import ConfigError
from ciphertune.models.hub import hub_answers

HUB = "hub:"
"""What a source begins with that is a data set on the hub: ``hub:owner/name``."""
_EXTRA = 'pip install "ciphertune[data]"'
_SAVED = ("dataset_info.json", "dataset_dict.json")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``datasets``' ``save_to_disk``."""
    return any((folder / name).is_file() for name in _SAVED)


def rows_of_columns(path: Path) -> list[Row]:
    """The rows of a ``.parquet`` or ``.arrow`` file. No copy of it is written.

    Raises:
        ConfigError: ``datasets`` is missing, or cannot read it.
    """
    datasets = _datasets(f"{path} is {'a Parquet' if form(path) == '.parquet' else 'an Arrow'} table")
    with _quiet(datasets), _reading(str(path)):
        data = datasets.load_dataset(form(path)[1:], data_files=_literal(path), split="train", streaming=True)
        return _rows(data, str(path))


def rows_saved(folder: Path, split: str) -> list[Row]:
    """The rows of a folder that ``save_to_disk`` wrote, of one split if it has several. Raises ``ConfigError``."""
    datasets = _datasets(f"{folder} is a data set saved by it")
    with _quiet(datasets), _reading(str(folder)):
        return _rows(_one(datasets, datasets.load_from_disk(str(folder)), str(folder), split), str(folder))


def rows_of_hub(source: str, split: str) -> list[Row]:
    """The rows of ``hub:owner/name`` or ``hub:owner/name/configuration``, fetched and kept as ``datasets`` does.

    Raises:
        ConfigError: ``datasets`` is missing, or the hub does not give it.
    """
    datasets = _datasets(f"{source} is on the hub")
    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, configuration = rest.partition("/")
    if not owner or not name:
        raise ConfigError(f"data.source {source!r} must be hub:OWNER/NAME or hub:OWNER/NAME/CONFIGURATION")
    with _quiet(datasets), _offline(datasets), _reading(source):
        data = datasets.load_dataset(f"{owner}/{name}", configuration or None)
        return _rows(_one(datasets, data, source, split), source)


def _datasets(what: str) -> Any:
    try:
        return import_optional("datasets", _EXTRA)
    except ConfigError as error:
        raise ConfigError(f"data.source: {what}: {error}") from error


def _literal(path: Path) -> str:
    """The path with its brackets and stars taken as they are, since ``datasets`` takes a pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(path.resolve()))


def _one(datasets: Any, data: Any, source: str, split: str) -> Any:
    if not isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return data
    if split not in data:
        known = ", ".join(map(repr, data))
        raise ConfigError(f"data.source: {source} has no split {split!r}; set data.split to one of {known}")
    return data[split]


def _rows(data: Any, source: str) -> list[Row]:
    features = data.features or {}
    names = {column: feature.names for column, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    return [
        Row(f"row {number} of {source}", {column: _named(value, names.get(column)) for column, value in row.items()})
        for number, row in enumerate(data, 1)
    ]


def _named(value: Any, names: list[str] | None) -> Any:
    """A label by its name; -1 is none."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # Of datasets, pyarrow and the hub's client; of that error, the text says no more than that it is one.
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        text = " ".join(str(cause or error).split())[:300]
        raise ConfigError(f"data.source: datasets cannot read {source}: {text or type(error).__name__}") from error


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Take copies of this machine at once where the hub cannot be reached, which is tried for half a minute else."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not hub_answers():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without progress bars, and without the logs of the library and of the hub's client, whose error says it all."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
