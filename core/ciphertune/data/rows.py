"""Rows with named fields, from JSON lines, JSON and tables as text; each says where it stands."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ciphertune.data.files import LINES, SEPARATED, decoded, form, named
from ciphertune.errors import ConfigError

_SEPARATORS = ",;\t|"


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of the data.

    Attributes:
        place: where it stands, for messages: ``line 3 of chats.jsonl``.
        fields: values by the name of their field or column.
    """

    place: str
    fields: Mapping[str, Any]


def rows_of_file(path: Path) -> list[Row]:
    """The rows of a ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.tsv`` file, also compressed.

    Values of tables are texts as they stand: ``007`` stays ``007``.

    Raises:
        ConfigError: a line is not what the suffix says. Of the content nothing is quoted but names of fields.
        OSError: the file cannot be opened.
    """
    text = decoded(path)
    kind = form(path)
    if kind in LINES:
        return list(_lines(text, path))
    if kind in SEPARATED:
        return list(_separated(text, path, "\t" if kind == ".tsv" else None))
    return list(_document(text, path))


def _lines(text: str, path: Path) -> Iterator[Row]:
    # Only a line feed ends a line: JSON may hold the other separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        place = f"line {number} of {path}"
        if not line.strip():
            continue
        # The line itself is private: an error must not quote it.
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(
                f"{place} is not a JSON object; it may be cut. One object a line is expected{_whole(line)}"
            ) from None
        yield Row(place, _object(value, place, line))


def _whole(line: str) -> str:
    """What to do where a line looks like the beginning of one list over the whole file."""
    return ": if the file is one list, name it .json" if line.strip().startswith("[") else ""


def _object(value: Any, place: str, line: str = "") -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{place} is not a JSON object but {_kind(value)}: fields with names are expected{_whole(line)}"
        )
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _document(text: str, path: Path) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ConfigError(f"data.source: {path} is nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            yield from _lines(text, path)
            return
        raise ConfigError(
            f"data.source: {path} is not JSON (line {error.lineno}: {error.msg}); it may be cut"
        ) from None
    except ValueError:  # a number of thousands of digits
        raise ConfigError(f"data.source: {path} is not JSON that can be read") from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) == 1:
            value = lists[0]
        elif lists:
            raise ConfigError(
                f"data.source: {path} is one JSON object with {len(lists)} lists of objects, {named(value)}: write the "
                "one to train on to a file of its own"
            )
        else:
            value = [value]
    if not isinstance(value, list):
        raise ConfigError(f"data.source: {path} is {_kind(value)}, not a list of JSON objects")
    for number, item in enumerate(value, 1):
        place = f"item {number} of {path}"
        yield Row(place, _object(item, place))


def _separated(text: str, path: Path, separator: str | None) -> Iterator[Row]:
    header_line = text.lstrip("\n").partition("\n")[0]
    chosen = separator or max(_SEPARATORS, key=header_line.count)
    # A cell may be as long as a document.
    limit = csv.field_size_limit(min(sys.maxsize, 1 << 31) - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=chosen, strict=True)
        header: list[str] | None = None
        line = 1
        for cells in _read(reader, path):
            place = f"line {line} of {path}"
            line = reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise ConfigError(f"{place} should name the columns, but names one twice: write such a line first")
                continue
            if len(cells) != len(header):
                raise ConfigError(
                    f"{place} has {len(cells)} columns, and the first line {len(header)}: put values with "
                    f"{chosen!r} in them into quotes"
                )
            yield Row(place, dict(zip(header, cells, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _read(reader: Any, path: Path) -> Iterator[list[str]]:
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(
                f"line {begin} of {path} cannot be read as a row of a table ({error}): a quote is not closed, or "
                "not doubled within quotes"
            ) from None
        yield cells
