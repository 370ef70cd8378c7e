"""What a newcomer does wrong, found by following the pages: each is one sentence, found before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.models.load import load_named_model
from ciphertune.runs.config import load_config
from ciphertune.runs.train import run_training

CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4


@pytest.mark.parametrize(
    ("name", "content", "task", "said"),
    [
        (
            "a.jsonl",
            b'{"text": null}\n',
            "language",
            r"line 1 of .*a\.jsonl: the field 'text' holds no text \(null\): leave the row out",
        ),
        ("a.jsonl", b'{"text": 3}\n', "language", r"'text' holds no text \(int\)"),
        ("a.jsonl", json.dumps(CHATS).encode(), "language", "but a list.*if the file is one list, name it .json"),
        ("a.jsonl", json.dumps(CHATS, indent=1).encode(), "language", "if the file is one list, name it .json"),
        ("a.txt", "the fox".encode("utf-16"), "language", "is UTF-16, not UTF-8 text: save it as UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "classification", "is UTF-16.*save it as UTF-8"),
        ("a.csv", b"no fever,well\nfever,ill\n", "classification", "look whether the first line of the table names"),
        (
            "a.csv",
            b"text,label\n" + b"".join(b"t%d,l%d\n" % (n, n) for n in range(9)),
            "classification",
            "each of the 9 rows has a label of its own",
        ),
        ("a.csv", b"text,label\na,b\nc,b\n", "classification", "there are 1 different labels in 2 rows"),
    ],
)
def test_data_as_people_have_it(project: Path, name: str, content: bytes, task: str, said: str) -> None:
    (project / name).write_bytes(content)
    (project / "model" / "model.safetensors").unlink()
    file = project / "a.toml"
    file.write_text(
        f'task = "{task}"\nto = "clear"\n[model]\nname = "model"\n[data]\nsource = "{name}"\n[training]\noutput = "a"\n'
    )
    with pytest.raises(ConfigError, match=said):
        run_training(load_config(file))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps = 8", "steps = 99999999999999999999999", r"training\.steps is too large a number"),
        ("steps = 8", "steps = 8\naccumulation = 9223372036854775808", r"accumulation is too large a number"),
        ('name = "model"', 'name = ""', r"model\.name must be"),
        ('source = "text.txt"', 'source = ""', r"data\.source must be"),
        ('output = "out"', 'output = ""', r"training\.output must be"),
    ],
)
def test_values_that_no_run_can_have(project: Path, old: str, new: str, said: str) -> None:
    file = project / "run.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        load_config(file)


def test_names_that_need_no_hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be sent out, and tried for half a minute where there is no network."""
    monkeypatch.chdir(project)
    for name, said in (
        ("modle", "did you mean the folder 'model'"),
        ("llama-3-8b", "it is a shape without weights, for 'ciphertune plan'"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_named_model(name)


def test_a_misspelt_command_is_suggested() -> None:
    result = CliRunner().invoke(cli, ["trian", "run.toml"])
    assert result.exit_code == 2
    assert "No such command 'trian'. Did you mean 'train'?" in result.output
