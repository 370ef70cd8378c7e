"""The data of a source: prose, rows from files and folders of them. What is something else is refused."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from ciphertune.data.files import COLUMNAR, HINT, PROSE, ROWS, counted, files_below, form, prose, refuse_other
from ciphertune.data.rows import Row, rows_of_file
from ciphertune.data.tables import HUB, is_saved, rows_of_columns, rows_of_hub, rows_saved
from ciphertune.errors import ConfigError

_ABOUT = ("readme", "license", "licence", "changelog")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a source holds.

    Attributes:
        rows: with named fields; of prose one a file, its text in the field ``text``.
        prose: whether they are texts of files.
    """

    rows: Sequence[Row]
    prose: bool


def read_data(source: str, *, files: str | None = None, split: str = "train") -> Data:
    """Read a source.

    Args:
        source: a file of prose (``.txt``, ``.md``, or of any other suffix that is of no known form); a file of rows
            (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``); either compressed
            (``.gz``, ``.bz2``, ``.xz``); a folder of the one or the other; a folder that ``datasets`` saved; or
            ``hub:owner/name``, which alone is looked for outside of this machine.
        files: of a folder, a pattern that the paths below it match, such as ``*.jsonl``.
        split: of a data set that has several.

    Raises:
        ConfigError: it does not exist, cannot be read, is of a form that is not read, or holds nothing. Of the content
            nothing is quoted but names of fields.
    """
    if source.startswith(HUB):
        return _held(Data(rows_of_hub(source, split), prose=False), source)
    path = Path(source).expanduser()
    try:
        if not path.is_dir():
            return _held(_file(path), source)
        if is_saved(path):
            return _held(Data(rows_saved(path, split), prose=False), source)
        return _held(_folder(path, files), source)
    except OSError as error:
        where = "" if error.filename in (None, source) else f": {error.filename}"
        hub = "; a data set of the hub is written hub:OWNER/NAME" if _could_be_on_hub(source) else ""
        raise ConfigError(f"cannot read data.source {source!r}{where}: {error.strerror or error}{hub}") from error


def _could_be_on_hub(source: str) -> bool:
    """Whether a source that does not exist is written like a name on the hub, and is none of a file."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not Path(source).suffix


def _held(data: Data, source: str) -> Data:
    rows = [row for row in data.rows if not data.prose or row.fields["text"].strip()]
    if not rows:
        raise ConfigError(f"data.source {source!r} holds no {'text' if data.prose else 'row'}")
    return Data(rows, data.prose)


def _file(path: Path) -> Data:
    if form(path) in COLUMNAR and path.is_file():
        return Data(rows_of_columns(path), prose=False)
    if form(path) in ROWS:
        return Data(rows_of_file(path), prose=False)
    return Data([Row(str(path), {"text": prose(path)})], prose=True)


def _folder(folder: Path, pattern: str | None) -> Data:
    found = files_below(folder)
    if pattern is not None:
        chosen = [file for file in found if fnmatch.fnmatch(file.relative_to(folder).as_posix(), pattern)]
        if not chosen:
            raise ConfigError(f"data.files: no file in {str(folder)!r} matches {pattern!r}; it holds {counted(found)}")
        for file in chosen:
            refuse_other(file)
        return _together(folder, [file for file in chosen if form(file) not in ROWS], _tables(chosen), found)
    tables = _tables(found)
    texts = [file for file in found if form(file) in PROSE]
    if tables:
        # Cards of data sets lie beside them.
        texts = [file for file in texts if not file.name.lower().startswith(_ABOUT)]
    return _together(folder, texts, tables, found)


def _tables(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if form(file) in ROWS]


def _together(folder: Path, texts: Sequence[Path], tables: Sequence[Path], found: Sequence[Path]) -> Data:
    if texts and tables:
        raise ConfigError(
            f"data.source {str(folder)!r} holds texts and rows, {counted([*texts, *tables])}: say which in data.files, "
            f'as in files = "*{tables[0].suffix}"'
        )
    if not texts and not tables:
        raise ConfigError(
            f"data.source {str(folder)!r} holds no text: no {', '.join((*PROSE, *ROWS))} file, but {counted(found)}: "
            f"{HINT}"
        )
    return Data([row for file in [*texts, *tables] for row in _file(file).rows], prose=bool(texts))
