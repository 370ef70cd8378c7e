"""Texts from files: prose, folders of it, and JSON lines. What is something else is refused, not trained on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ciphertune.errors import ConfigError

PROSE = (".txt", ".md")
"""Suffixes of the files of a folder that are texts."""
LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one JSON object a line."""

_LINES_HINT = "write one JSON object a line to a .jsonl file, and say in data.text_field which field is the text"
_OTHERS = {
    ".json": "JSON",
    ".csv": "a table of comma-separated values",
    ".tsv": "a table of tab-separated values",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".xml": "XML",
    ".toml": "TOML",
    ".ipynb": "a notebook",
    ".parquet": "a Parquet table",
    ".arrow": "an Arrow table",
    ".xlsx": "a spreadsheet",
    ".gz": "a compressed file",
    ".bz2": "a compressed file",
    ".xz": "a compressed file",
    ".zst": "a compressed file",
    ".zip": "an archive",
    ".tar": "an archive",
    ".pdf": "PDF",
    ".docx": "a word processor's file",
}
_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"%PDF": "PDF",
}
_FIELDS_NAMED = 5
_LONGEST_NAME = 40


def read_texts(source: str, text_field: str) -> list[str]:
    """The texts of a file or folder, without those that are blank.

    Args:
        source: a file of prose (one text), a folder (every ``.txt`` and ``.md`` file below it, links followed, what
            begins with a dot left out), or a ``.jsonl`` or ``.ndjson`` file (one object a line).
        text_field: of the objects of a file of JSON lines.

    Raises:
        ConfigError: it does not exist, cannot be read, is of a form that is not read, or holds no text. Of the content
            nothing is quoted but names of fields.
    """
    path = Path(source)
    try:
        if path.is_dir():
            files = list(_files(path))
            texts = [_prose(file) for file in files if file.suffix.lower() in PROSE]
            if not texts:
                raise ConfigError(f"data.source {source!r} holds no text: no .txt or .md file, but {_listed(files)}")
        else:
            texts = _objects(path, text_field) if path.suffix.lower() in LINES else [_prose(path)]
    except OSError as error:
        raise ConfigError(f"cannot read data.source {source!r}: {error.filename}: {error.strerror}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"data.source {source!r} holds no text")
    return texts


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder in order of their paths, each once however many links lead to it."""
    seen: set[str] = set()
    found: list[Path] = []
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        # A folder that links to one above it would be walked for ever.
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            found += [Path(where, name) for name in names if not name.startswith(".")]
    for file in sorted(found):
        real = os.path.realpath(file)
        if real not in seen:
            seen.add(real)
            yield file


def _refuse(error: OSError) -> None:
    raise error


def _listed(files: list[Path]) -> str:
    counts = Counter(file.suffix.lower() or "files without a suffix" for file in files)
    return ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common(5)) or "no file at all"


def _decoded(path: Path) -> str:
    """A file's text, with line feeds as line ends and without a byte order mark."""
    with path.open("rb") as stream:
        begin = stream.read(4)
    for mark, form in _MARKS.items():
        if begin.startswith(mark):
            raise ConfigError(f"cannot read data.source: {path} is {form}, not UTF-8 text")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"cannot read data.source: {path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ConfigError(f"cannot read data.source: {path} holds zero bytes, so it is not text")
    return text


def _prose(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _OTHERS and path.is_file():
        raise ConfigError(f"data.source: {path} is {_OTHERS[suffix]}{_inside(path, suffix)}, not prose: {_LINES_HINT}")
    text = _decoded(path)
    if (found := _structure(text)) is not None:
        raise ConfigError(f"data.source: {path} holds {found}, not prose: {_LINES_HINT}")
    return text


def _inside(path: Path, suffix: str) -> str:
    """What a file of another form holds, as far as a glance tells."""
    try:
        text = _decoded(path)
    except ConfigError:
        return ""
    if suffix in (".csv", ".tsv"):
        columns = text.partition("\n")[0].count("," if suffix == ".csv" else "\t") + 1
        return f" ({len(text.splitlines())} lines, {columns} columns)"
    found = _structure(text)
    return "" if found is None else f" ({found})"


def _structure(text: str) -> str | None:
    """What JSON a text is, None for any other text."""
    begin = text.lstrip()[:1]
    if begin not in ("{", "["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        first = next((item for item in value if isinstance(item, dict)), None)
        return f"a list of {len(value)} JSON values" + ("" if first is None else f", {_named(first)}")
    if isinstance(value, dict):
        return f"a JSON object, {_named(value)}"
    lines = [line for line in text.splitlines()[:3] if line.strip()]
    try:
        objects = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    return "JSON lines" if len(objects) > 1 and all(isinstance(item, dict) for item in objects) else None


def _named(fields: dict[str, Any]) -> str:
    """The names of fields that hold text, for a message."""
    names = [name[:_LONGEST_NAME] for name, value in fields.items() if isinstance(value, str)]
    return f"with text in {', '.join(map(repr, names[:_FIELDS_NAMED]))}" if names else "with no field of text"


def _objects(path: Path, field: str) -> list[str]:
    # Only a line feed ends a line: JSON may hold the other separators as they are.
    return [_field(line, field, path, number) for number, line in enumerate(_decoded(path).split("\n"), 1)]


def _field(line: str, name: str, path: Path, number: int) -> str:
    # The line itself is private: an error must not quote it.
    where = f"line {number} of {path}"
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not a JSON object with the text field {name!r}")
    text = row.get(name)
    if not isinstance(text, str):
        raise ConfigError(
            f"{where} is a JSON object without the text field {name!r}, {_named(row)}: set data.text_field"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{where} holds half of a character (an escape of U+D800 to U+DFFF alone): mend the line or leave it out"
        ) from None
    return text
