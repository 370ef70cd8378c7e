"""Files as people have them: found in folders, opened, unpacked and decoded. What cannot be read is said plainly."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ciphertune.errors import ConfigError

PROSE = (".txt", ".md")
"""Suffixes of files that are texts."""
LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one JSON object a line."""
SEPARATED = (".csv", ".tsv")
"""Suffixes of tables as text."""
COLUMNAR = (".parquet", ".arrow")
"""Suffixes of tables that the ``datasets`` library reads."""
ROWS = (*LINES, ".json", *SEPARATED, *COLUMNAR)
"""Suffixes of files that hold rows with named fields."""

_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_OTHERS = {
    ".yaml": "YAML",
    ".yml": "YAML",
    ".xml": "XML",
    ".html": "HTML",
    ".htm": "HTML",
    ".toml": "TOML",
    ".ipynb": "a notebook",
    ".xls": "a spreadsheet",
    ".xlsx": "a spreadsheet",
    ".ods": "a spreadsheet",
    ".db": "a database",
    ".sqlite": "a database",
    ".zst": "a file compressed by zstd",
    ".zip": "an archive",
    ".tar": "an archive",
    ".tgz": "an archive",
    ".7z": "an archive",
    ".pdf": "PDF",
    ".doc": "a word processor's file",
    ".docx": "a word processor's file",
    ".odt": "a word processor's file",
    ".rtf": "a word processor's file",
    ".pkl": "a Python pickle",
    ".pt": "a file of torch",
}
_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed by gzip, without the suffix .gz",
    b"%PDF": "PDF",
    b"PAR1": "a Parquet table, without the suffix .parquet",
}
HINT = (
    "save it as text (.txt, .md) or as rows with named fields (.jsonl, .json, .csv, .parquet), and say in "
    "data.text_field which field is the text"
)
"""What to do with a file that is neither."""
_FIELDS_NAMED = 8
_LONGEST_NAME = 40


def form(path: Path) -> str:
    """The suffix that says what a file is, in small letters, that of a compression left out.

    >>> form(Path("chats.JSONL.gz"))
    '.jsonl'
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _UNPACK else suffix


def files_below(folder: Path) -> list[Path]:
    """The files below a folder in order of their paths, each once however many links lead to it.

    Links are followed; what begins with a dot is left out. Raises ``OSError``.
    """
    seen: set[str] = set()
    found: list[Path] = []
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        # A folder that links to one above it would be walked for ever.
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            found += [Path(where, name) for name in names if not name.startswith(".")]
    return list(_each_once(sorted(found)))


def _each_once(files: Sequence[Path]) -> Iterator[Path]:
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real not in seen:
            seen.add(real)
            yield file


def _refuse(error: OSError) -> None:
    raise error


def counted(files: Sequence[Path]) -> str:
    """The suffixes of files with their numbers, for a message."""
    counts = Counter(file.suffix.lower() or "files without a suffix" for file in files)
    return ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common(5)) or "no file at all"


def refuse_other(path: Path) -> None:
    """Raise ``ConfigError`` for a file whose suffix says that it holds neither text nor rows."""
    if path.suffix.lower() in _OTHERS and path.is_file():
        raise ConfigError(f"data.source: {path} is {_OTHERS[path.suffix.lower()]}, which is not read: {HINT}")


def decoded(path: Path) -> str:
    """A file's text, unpacked where its suffix says so, with line feeds as line ends and no byte order mark.

    Raises:
        ConfigError: it is no UTF-8 text, or damaged. Nothing of it is quoted.
        OSError: it cannot be opened.
    """
    content = path.read_bytes()
    unpack = _UNPACK.get(path.suffix.lower())
    if unpack is not None:
        try:
            content = unpack(content)
        except (EOFError, OSError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise ConfigError(
                f"cannot read data.source: {path} cannot be unpacked; it is cut, damaged, or not {path.suffix}"
            ) from error
    for mark, what in _MARKS.items():
        if content.startswith(mark):
            how = ": save it as UTF-8" if what == "UTF-16" else ""
            raise ConfigError(f"cannot read data.source: {path} is {what}, not UTF-8 text{how}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"cannot read data.source: {path} is not UTF-8 text (byte {error.start}, line {line}): save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ConfigError(f"cannot read data.source: {path} holds zero bytes, so it is not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prose(path: Path) -> str:
    """The text of a file of prose. Raises ``ConfigError`` for what looks like something else, ``OSError``."""
    refuse_other(path)
    text = decoded(path)
    if (found := _structure(text)) is not None:
        raise ConfigError(
            f"data.source: {path} holds {found}, not prose: give the file the suffix .jsonl or .json, and say in "
            "data.text_field which field is the text"
        )
    check_letters(text, str(path))
    return text


def check_letters(text: str, place: str) -> None:
    """Raise ``ConfigError`` for a text with half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{place} holds half of a character (an escape of U+D800 to U+DFFF alone): mend it or leave it out"
        ) from None


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
        return f"a list of {len(value)} JSON values" + ("" if first is None else f", with {named(first)}")
    if isinstance(value, dict):
        return f"a JSON object, with {named(value)}"
    lines = [line for line in text.splitlines()[:3] if line.strip()]
    try:
        objects = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    return "JSON lines" if len(objects) > 1 and all(isinstance(item, dict) for item in objects) else None


def named(fields: Mapping[str, Any]) -> str:
    """The names of fields, for a message; none that could be a line of data where a header was expected."""
    names = [f"{name!r}" if _is_name(name) else f"(a name of {len(name)} letters)" for name in map(str, fields)]
    if not names:
        return "no field"
    more = f" and {len(names) - _FIELDS_NAMED} more" if len(names) > _FIELDS_NAMED else ""
    return f"the {'field' if len(names) == 1 else 'fields'} {', '.join(names[:_FIELDS_NAMED])}{more}"


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_NAME and not any(letter.isspace() for letter in text)
