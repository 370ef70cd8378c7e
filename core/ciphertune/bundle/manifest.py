"""The manifest of a client's part, read with distrust: whoever made the bundle chose every number in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from ciphertune._support.bundle_names import CLIENT_MANIFEST
from ciphertune.errors import ConfigError

_LARGEST = (1 << 31) - 1
_MOST_LAYERS = 1 << 17
_MOST_FILES = 1 << 14
_LONGEST_NAME = 512
_LARGEST_CONFIG = 1 << 24
_LARGEST_CODE = {8: 127, 16: 32639}
_ABOVE = 1.0 + 1e-9
_SMALL = 1 << 18
"""Whole numbers up to this are in any configuration: sizes of pictures, rates of sound, numbers of tokens."""
_LONG = ("position", "window", "length", "seq", "ctx", "context", "chunk", "theta", "base")
"""Parts of names of numbers that follow from no tensor: lengths of texts and sound, bases of rotary frequencies."""
_TABLES_IN_PYTHON = frozenset(
    {
        "autoformer",
        "distilbert",
        "flaubert",
        "informer",
        "marian",
        "pegasus",
        "roformer",
        "time_series_transformer",
        "xlm",
    }
)
_POSITIONS = ("max_position_embeddings", "context_length", "prediction_length")
_WIDTHS = ("d_model", "dim", "emb_dim", "hidden_size")
_COUNTS = frozenset({"num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"})


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """A layer as a manifest describes it; sizes and norms as in ``LayerInfo``.

    Attributes:
        kept: whether the client keeps channels of it.
    """

    name: str
    in_features: int
    out_features: int
    max_row_norm: float
    max_column_norm: float
    kept: bool = False


@dataclasses.dataclass(frozen=True)
class ClientManifest:
    """The manifest of a client's part, every field in its range.

    Attributes:
        model: what the model is called.
        dtype: name of the dtype of the tensors that stay.
        architecture: class of transformers; None for a model that is not transformers'.
        weight_bits: of a code.
        layers: the outsourced layers, and behind them a token embedding that is none of them.
        groups: layers of the same input, as indices; each layer is in one.
        embeddings: names of the token embedding that is outsourced, by each of its places; none if it stays.
    """

    model: str
    dtype: str
    architecture: str | None
    weight_bits: Literal[8, 16]
    layers: tuple[LayerEntry, ...]
    groups: tuple[tuple[int, ...], ...]
    embeddings: tuple[str, ...] = ()


def read_client(folder: Path, content: Mapping[str, Any]) -> ClientManifest:
    """Check every field of a client's manifest.

    Args:
        folder: for messages.
        content: of the file.

    Raises:
        ConfigError: a field is missing, of the wrong type or out of range; the message names it.
    """
    reader = _Reader(folder / CLIENT_MANIFEST)
    bits = content.get("weight_bits")
    if type(bits) is not int or bits not in (8, 16):
        reader.fail("weight_bits", "8 or 16", bits)
    rows = reader.items(content, "layers", _MOST_LAYERS)
    if not rows:
        reader.fail("layers", "at least one layer", rows)
    layers = tuple(reader.layer(f"layers[{number}]", row, bits) for number, row in enumerate(rows))
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        reader.fail("layers", "each layer once", twice)
    groups = tuple(
        reader.group(f"groups[{number}]", group, layers)
        for number, group in enumerate(reader.items(content, "groups", _MOST_LAYERS))
    )
    # Bundles without outsourced embeddings need not say so.
    embeddings = tuple(reader.items({"embeddings": [], **content}, "embeddings", _MOST_LAYERS))
    if not all(isinstance(name, str) for name in embeddings):
        reader.fail("embeddings", "names of layers", embeddings)
    grouped = len(layers) - int(bool(embeddings) and layers[-1].name == embeddings[0])
    if not groups or sorted(i for group in groups for i in group) != list(range(grouped)):
        reader.fail("groups", "each layer in one group", f"{len(groups)} groups of {grouped} layers")
    architecture = content.get("architecture")
    return ClientManifest(
        reader.text(content, "model", least=0),
        reader.text(content, "dtype"),
        None if architecture is None else reader.text(content, "architecture"),
        8 if bits == 8 else 16,
        layers,
        groups,
        embeddings,
    )


class _Reader:
    """Takes values out of a manifest, and says of a wrong one where it stands."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def fail(self, field: str, expected: str, found: Any) -> NoReturn:
        told = repr(found)
        told = told if len(told) <= 60 else told[:57] + "..."
        raise ConfigError(f"{self._file} is damaged: {field}: expected {expected}, got {told}")

    def text(self, content: Mapping[str, Any], key: str, where: str = "", least: int = 1) -> str:
        value = content.get(key)
        if not isinstance(value, str) or not least <= len(value) <= _LONGEST_NAME or not value.isprintable():
            self.fail(where + key, f"a printable text of at most {_LONGEST_NAME} characters", value)
        return value

    def items(self, content: Mapping[str, Any], key: str, most: int) -> list[Any]:
        value = content.get(key)
        if not isinstance(value, list) or len(value) > most:
            self.fail(key, f"a list of at most {most}", value)
        return value

    def whole(self, content: Mapping[str, Any], key: str, where: str) -> int:
        value = content.get(key)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            self.fail(where + key, f"a whole number from 1 to {_LARGEST}", value)
        return value

    def norm(self, content: Mapping[str, Any], key: str, where: str, largest: float) -> float:
        value = content.get(key)
        if type(value) not in (int, float) or not 0 <= value <= largest:  # type: ignore[operator]
            self.fail(where + key, f"a norm from 0 to {largest:.6g}", value)
        return float(value)  # type: ignore[arg-type]

    def layer(self, where: str, row: Any, bits: int) -> LayerEntry:
        if not isinstance(row, dict):
            self.fail(where, "a layer", row)
        where += "."
        name = self.text(row, "name", where)
        k, n = self.whole(row, "in_features", where), self.whole(row, "out_features", where)
        code = _LARGEST_CODE[bits] * _ABOVE
        row_norm = self.norm(row, "max_row_norm", where, code * math.sqrt(k))
        column_norm = self.norm(row, "max_column_norm", where, code * math.sqrt(n))
        kept = row.get("kept", False)
        if not isinstance(kept, bool):
            self.fail(f"{where}kept", "true or false", kept)
        return LayerEntry(name, k, n, row_norm, column_norm, kept)

    def group(self, where: str, group: Any, layers: tuple[LayerEntry, ...]) -> tuple[int, ...]:
        fits = isinstance(group, list) and group and all(type(i) is int and 0 <= i < len(layers) for i in group)
        if not fits:
            self.fail(where, f"numbers of layers, below {len(layers)}", group)
        if len({layers[i].in_features for i in group}) > 1:
            self.fail(where, "layers of equal in_features", group)
        return tuple(group)


def refuse_strange_files(folder: Path) -> None:
    """Refuse a folder with links out of it, or with what is no plain file: reading it could reach or wait for others.

    Raises:
        ConfigError: naming the file.
    """
    root = os.path.realpath(folder)
    count = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            count += 1
            path = Path(place) / name
            real = os.path.realpath(path)
            if os.path.commonpath([root, real]) != root:
                raise ConfigError(f"{path} is a link that leads out of the bundle: copy the file to where it is")
            mode = path.stat().st_mode if path.exists() else 0
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ConfigError(f"{path} is no plain file: a bundle holds no other")
        if count > _MOST_FILES:
            raise ConfigError(f"{folder} holds more than {_MOST_FILES} files: it is no client's part of a bundle")


class Sizes(NamedTuple):
    """Of the tensors of a model, those at the workers included, as files say them before anything is read.

    Attributes:
        tensors: their number.
        dimension: the largest of any of them.
        numbers: in all of them together.
    """

    tensors: int
    dimension: int
    numbers: int


def sizes_of(shapes: Iterable[Sequence[int]]) -> Sizes:
    """The sizes of tensors of these shapes."""
    known = [tuple(shape) for shape in shapes]
    return Sizes(len(known), max(itertools.chain(*known), default=0), sum(map(math.prod, known)))


def check_model_config(folder: Path, sizes: Sizes) -> None:
    """Look at a model's ``config.json`` before anything is built of it.

    Numbers in it become lists and loops of Python, which nothing else bounds. So none may be larger than the tensors of
    the model give reason for, but lengths of texts and bases of rotary frequencies, of which ``models.bounded`` bounds
    what is made.

    Args:
        folder: of the model; one without the file is left to transformers.
        sizes: of the model's tensors. A model has no more layers than tensors.

    Raises:
        ConfigError: the file is no JSON object, or a number in it is none or out of range; the message names it.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    reader = _Reader(file)
    if file.stat().st_size > _LARGEST_CONFIG:
        reader.fail("size", f"at most {_LARGEST_CONFIG} bytes", file.stat().st_size)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: it is not JSON") from error
    if not isinstance(content, dict):
        reader.fail("content", "an object", content)
    _check_tables(reader, content, sizes)
    largest = max(sizes.dimension, sizes.tensors, _SMALL)
    waiting: list[tuple[str, Any]] = list(content.items())
    while waiting:
        where, value = waiting.pop()
        key = where.rpartition(".")[2]
        if isinstance(value, dict):
            waiting += [(f"{where}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where}[{number}]", each) for number, each in enumerate(value)]
        elif isinstance(value, float) and math.isnan(value):
            reader.fail(where, "a number", value)
        elif not isinstance(value, int):
            continue
        elif not -_LARGEST <= value <= _LARGEST:
            reader.fail(where, f"a whole number up to {_LARGEST}", value)
        elif key in _COUNTS and value > sizes.tensors:
            reader.fail(where, f"no more layers than the {sizes.tensors} tensors of this model", value)
        elif value > largest and not any(word in key for word in _LONG):
            reader.fail(where, f"at most {largest}, as large as anything in this model", value)


def _check_tables(reader: _Reader, content: Mapping[str, Any], sizes: Sizes) -> None:
    """Bound the tables of positions that some families of models compute number by number in Python."""
    if content.get("model_type") not in _TABLES_IN_PYTHON:
        return
    for key in _POSITIONS:
        for width in _WIDTHS:
            rows, columns = content.get(key), content.get(width)
            if type(rows) is int and type(columns) is int and rows * columns > max(sizes.numbers, _SMALL):
                reader.fail(key, f"a table of positions no larger than the model's {sizes.numbers} numbers", rows)
