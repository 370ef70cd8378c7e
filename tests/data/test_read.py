"""Texts from files of people: as what they are, or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ciphertune.data.read import read_data
from ciphertune.errors import ConfigError

TEXT = "A worker sees ciphertext, shapes and timing, and nothing else of the text. "
ROWS = [{"text": f"{TEXT}{number}", "id": number} for number in range(6)]
LINES = "\n".join(map(json.dumps, ROWS))


def read_texts(source: str) -> list[str]:
    return [row.fields["text"] for row in read_data(source).rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_json_lines(tmp_path: Path, name: str, mark: bytes, end: str) -> None:
    (tmp_path / name).write_bytes(mark + LINES.replace("\n", end).encode() + end.encode())
    assert read_texts(str(tmp_path / name)) == [row["text"] for row in ROWS]


def test_separators_that_json_may_hold_end_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_texts(str(tmp_path / "a.jsonl")) == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.yaml", b"- text: private words", "YAML"),
        ("a.parquet", b"PAR1" + bytes(range(256)) + b"PAR1", "datasets cannot read"),
        ("a.csv", b"text,id\nprivate words,1\nprivate words\n", "line 3"),
        ("a.csv", b'text,id\n"private\nwords",1\n"private words,2\n', "line 4"),
        ("a.csv", b"text,text\nprivate words,1\n", "names one twice"),
        ("a.json", b'[{"text": "private words"},\n{"te', "line 2"),
        ("a.json", b'[{"text": "private words"}, 3]', "item 2"),
        ("a.json", b'"private words"', "a text, not a list"),
        ("a.json", b'{"train": [{"text": "private words"}], "test": [{"text": "x"}]}', "2 lists of objects"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:60], "cut"),
        ("a.csv.gz", b"private words", "cannot be unpacked"),
        ("a.xlsx", b"PK\x03\x04private words", "a spreadsheet"),
        ("a.txt", LINES.encode(), "JSON lines"),
        ("a.txt", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), "a list of 6 JSON values, with the fields"),
        ("notes", json.dumps({"text": "private words"}).encode(), "a JSON object"),
        ("a.txt", TEXT.encode("utf-16"), "UTF-16"),
        ("a.txt", b"private words\0" * 9, "zero bytes"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8 text (byte 3, line 1)"),
        ("a.bin", b"PK\x03\x04" + bytes(9), "a zip archive"),
        ("a.jsonl", b'["private words"]', "line 1"),
        ("a.jsonl", LINES.encode() + b"\n{", "line 7"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_texts(str(tmp_path / name))
    assert found in str(caught.value)
    assert name in str(caught.value)
    assert "private words" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_texts(str(tmp_path / "a.txt")) == [TEXT]


@pytest.mark.parametrize(
    "text", ["[see below] prose", "{curly} prose", "[\n", "{ not json }\n{ nor this }\n", "[1] A. Author."]
)
def test_prose_may_begin_with_a_bracket(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read_texts(str(tmp_path / "a.txt")) == [text]


def test_a_folder_and_what_it_links_to(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path, text in {
        folder / "a.txt": "one",
        folder / "deep" / "B.MD": "two",
        folder / "table.dat": "no,text",
        folder / ".hidden.txt": "no",
        folder / "._a.txt": "no",
        folder / ".ipynb_checkpoints" / "a-checkpoint.txt": "no",
        elsewhere / "c.txt": "three",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (folder / "again.txt").symlink_to(elsewhere / "c.txt")
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    assert sorted(read_texts(str(folder))) == ["one", "three", "two"]


def test_a_folder_without_texts_says_what_is_in_it(tmp_path: Path) -> None:
    for name in ("a.xls", "b.xls", "c.pdf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=r"holds no text: no \.txt, .* file, but \.xls \(2\), \.pdf \(1\)"):
        read_texts(str(tmp_path))


def test_of_a_folder_the_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"good{number}.txt").write_text(TEXT)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8"):
        read_texts(str(tmp_path))


def rows(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in read_data(str(path), **options).rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.JSON", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("lines.json", LINES),
    ],
)
def test_json(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert rows(tmp_path / name) == ROWS


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(LINES.encode()))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(TEXT.encode()))
    assert rows(tmp_path / f"a.jsonl{suffix}") == ROWS
    assert rows(tmp_path / f"a.txt{suffix}") == [{"text": TEXT}]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.csv", "\t")])
def test_tables_as_text(tmp_path: Path, name: str, mark: str) -> None:
    """Values stay as they are written, and cells hold line ends, separators and quotes."""
    lines = ["text,label,note", '"one, and ""two""",007,NA', '"three\nfour",1.0,', ",,", f"{'long ' * 40000},,"]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).replace(",", mark).encode())
    found = read_data(str(tmp_path / name)).rows
    assert [row.place.partition(" of ")[0] for row in found] == ["line 2", "line 3", "line 6"]
    assert found[0].fields == {"text": f'one{mark} and "two"', "label": "007", "note": "NA"}
    assert found[1].fields == {"text": "three\nfour", "label": "1.0", "note": ""}


def test_a_parquet_table_and_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels come by their names; nothing of the data is left in the library's cache."""
    datasets = pytest.importorskip("datasets")
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    wanted = [{"text": "a", "label": "yes"}, {"text": "b", "label": None}]
    data.to_parquet(str(tmp_path / "[1] a*.parquet"))
    assert rows(tmp_path / "[1] a*.parquet") == wanted
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) == 0
    data.save_to_disk(str(tmp_path / "saved"))
    assert rows(tmp_path / "saved") == wanted
    datasets.DatasetDict({"train": data, "more": data.select([0])}).save_to_disk(str(tmp_path / "several"))
    assert rows(tmp_path / "several", split="more") == wanted[:1]
    with pytest.raises(ConfigError, match=r"no split 'test'; set data\.split to one of 'train', 'more'"):
        read_data(str(tmp_path / "several"), split="test")


def test_without_datasets_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r'a\.parquet is a Parquet table: .*pip install "ciphertune\[data\]"'):
        read_data(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text(LINES)
    assert rows(tmp_path / "a.jsonl") == ROWS


def test_the_hub_alone_is_asked_and_only_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match="No such file or directory; a data set of the hub is written hub:OWNER/NAME"):
        read_data("owner/name")
    assert asked == []
    assert read_data("hub:owner/name/english").rows[0].fields == {"text": "a"}
    assert asked == [("owner/name", "english")]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("cannot be reached"))
    )
    with pytest.raises(ConfigError, match="datasets cannot read hub:owner/name: cannot be reached"):
        read_data("hub:owner/name")


def test_a_folder_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.csv").write_text("text,id\nx,1\n")
    (tmp_path / "README.md").write_text("# About the data")
    assert rows(tmp_path) == [*ROWS, {"text": "x", "id": "1"}]
    assert rows(tmp_path, files="deep/*.csv") == [{"text": "x", "id": "1"}]
    assert rows(tmp_path, files="*.md") == [{"text": "# About the data"}]
    (tmp_path / "notes.txt").write_text("prose")
    with pytest.raises(ConfigError, match=r'holds texts and rows, .*files = "\*\.jsonl"'):
        read_data(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.files: no file .* matches '\*\.parquet'"):
        read_data(str(tmp_path), files="*.parquet")
