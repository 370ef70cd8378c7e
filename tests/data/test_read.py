"""Texts from files of people: as what they are, or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ciphertune.data.read import read_texts
from ciphertune.errors import ConfigError

TEXT = "A worker sees ciphertext, shapes and timing, and nothing else of the text. "
ROWS = [{"text": f"{TEXT}{number}", "id": number} for number in range(6)]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_json_lines(tmp_path: Path, name: str, mark: bytes, end: str) -> None:
    (tmp_path / name).write_bytes(mark + LINES.replace("\n", end).encode() + end.encode())
    assert read_texts(str(tmp_path / name), "text") == [row["text"] for row in ROWS]


def test_separators_that_json_may_hold_end_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_texts(str(tmp_path / "a.jsonl"), "text") == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", json.dumps(ROWS).encode(), "a list of 6 JSON values, with text in 'text'"),
        ("a.JSON", json.dumps(ROWS[0]).encode(), "a JSON object"),
        ("a.csv", b"text,id\n" + b"private words,1\n" * 6, "comma-separated values (7 lines, 2 columns)"),
        ("a.tsv", b"text\tid\n" + b"private words\t1\n", "2 columns"),
        ("a.yaml", b"- text: private words", "YAML"),
        ("a.jsonl.gz", gzip.compress(LINES.encode()), "a compressed file"),
        ("a.parquet", b"PAR1" + bytes(range(256)) + b"PAR1", "Parquet"),
        ("a.txt", LINES.encode(), "JSON lines"),
        ("a.txt", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), "a list of 6 JSON values"),
        ("notes", json.dumps({"text": "private words"}).encode(), "a JSON object"),
        ("a.txt", TEXT.encode("utf-16"), "UTF-16"),
        ("a.txt", b"private words\0" * 9, "zero bytes"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8 text (byte 3)"),
        ("a.bin", b"PK\x03\x04" + bytes(9), "a zip archive"),
        ("a.jsonl", b'{"body": "private words", "n": 1}', "with text in 'body': set data.text_field"),
        ("a.jsonl", b'{"text": 1}', "with no field of text"),
        ("a.jsonl", b'["private words"]', "line 1"),
        ("a.jsonl", LINES.encode() + b"\n{", "line 7"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": "private words \\ud83d cut"}', "half of a character"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_texts(str(tmp_path / name), "text")
    assert found in str(caught.value)
    assert name in str(caught.value)
    assert "private words" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_texts(str(tmp_path / "a.txt"), "text") == [TEXT]


@pytest.mark.parametrize(
    "text", ["[see below] prose", "{curly} prose", "[\n", "{ not json }\n{ nor this }\n", "[1] A. Author."]
)
def test_prose_may_begin_with_a_bracket(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read_texts(str(tmp_path / "a.txt"), "text") == [text]


def test_a_folder_and_what_it_links_to(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path, text in {
        folder / "a.txt": "one",
        folder / "deep" / "B.MD": "two",
        folder / "table.csv": "no,text",
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
    assert sorted(read_texts(str(folder), "text")) == ["one", "three", "two"]


def test_a_folder_without_texts_says_what_is_in_it(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.pdf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=r"holds no text: no \.txt or \.md file, but \.csv \(2\), \.pdf \(1\)"):
        read_texts(str(tmp_path), "text")


def test_of_a_folder_the_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"good{number}.txt").write_text(TEXT)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8"):
        read_texts(str(tmp_path), "text")
