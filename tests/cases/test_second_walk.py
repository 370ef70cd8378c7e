"""What a newcomer does wrong, found by following the pages: each is one sentence, found before the model is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import signal
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import warm
from click.testing import CliRunner

import ciphertune
from ciphertune import key_files
from ciphertune._support.atomic import put_directory
from ciphertune._support.locks import alone
from ciphertune.checkpoints.files import open_tensors
from ciphertune.cli import cli, main
from ciphertune.client.choice import choose
from ciphertune.errors import ConfigError, KeyFileError, TrainingError
from ciphertune.models.load import load_named_model
from ciphertune.runs.config import load_config
from ciphertune.runs.export import export_adapter
from ciphertune.runs.train import run_training
from ciphertune.training.trainer import LoraTrainer

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


def ended(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that fails, in one line at its end."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 1
    said = capsys.readouterr().err.strip()
    assert "a fault of CipherTune" not in said
    return said.splitlines()[-1]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "latin": lambda data: data[:9] + b"\xe9\xff" + data[9:],
    "null": lambda data: b"null",
    "deep": lambda data: b'{"a":' * 100_000,
}
"""What a file may hold instead of its content."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, project_in: Callable[[Path], Path]) -> Path:
    """A project after its run, with a bundle and keys."""
    folder = project_in(tmp_path_factory.mktemp("trained"))
    run_training(load_config(folder / "run.toml"))
    ciphertune.split(str(folder / "model"), folder / "bundle")
    CliRunner().invoke(cli, ["keys", str(folder / "keys")], catch_exceptions=False)
    return folder


FILES = [
    ("model/config.json", ("train", "run.toml", "--overwrite"), "fetch the model again"),
    ("model/generation_config.json", ("train", "run.toml", "--overwrite"), "fetch the model again"),
    ("model/tokenizer.json", ("train", "run.toml", "--overwrite"), "fetch the model again"),
    ("model/tokenizer_config.json", ("split", "model", "other"), "fetch the model again"),
    ("model/model.safetensors", ("split", "model", "other"), "is damaged"),
    ("out/adapter/adapter_config.json", ("train", "further.toml"), "adapter_config.json is damaged"),
    ("out/adapter/adapter_config.json", ("export", "model", "m", "--adapter", "out/adapter"), "is damaged"),
    ("out/adapter/adapter_model.safetensors", ("train", "further.toml"), "adapter_model.safetensors is damaged"),
    ("out/adapter/adapter_model.safetensors", ("generate", "run.toml", "a"), "adapter_model.safetensors is damaged"),
    ("out/adapter/adapter_model.safetensors", ("export", "model", "m", "--adapter", "out/adapter"), "is damaged"),
    ("out/result.json", ("train", "run.toml", "--overwrite", "--compare", "out/result.json"), "is not a result.json"),
    ("ck/checkpoint-8/state.json", ("train", "run.toml", "--resume"), "state.json cannot be used: it"),
    ("ck/checkpoint-8/trainable.safetensors", ("train", "run.toml", "--resume"), "is not the file that was written"),
    ("bundle/client/tokenizer.json", ("generate", "bundle/client", "--to", "clear+zmq://", "a"), "client's part"),
    ("bundle/worker/manifest.json", ("worker", "bundle/worker", "--insecure"), "manifest.json"),
    ("keys/worker.key", ("worker", "bundle/worker", "--curve", "keys"), "is damaged or not a key file"),
    ("speeds.json", ("plan", "model", "--client-speeds", "speeds.json"), "is no file of speeds"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("file", "command", "said"), FILES, ids=[f"{file}-{what[0]}" for file, what, _ in FILES])
def test_files_that_hold_something_else(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    command: Sequence[str],
    said: str,
    damage: str,
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    (folder / "speeds.json").touch()
    run = (folder / "run.toml").read_text()
    (folder / "further.toml").write_text(
        run.replace('name = "model"', 'name = "model"\nadapter = "out/adapter"')
        .replace('"ck"', '"ck2"')
        .replace('output = "out"', 'output = "out2"')
    )
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(DAMAGES[damage](content))
    assert said in ended(command, capsys)


def test_tensors_that_may_not_be_read_are_not_called_damaged(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says of every refusal of the system that there is no such file."""

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors: Permission denied"):
        open_tensors(trained / "model" / "model.safetensors")


def test_a_link_to_weights_that_leads_nowhere(project: Path) -> None:
    """As a hub's cache has them whose files were removed."""
    weights = project / "model" / "model.safetensors"
    weights.unlink()
    weights.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a link that leads nowhere"):
        load_named_model(str(project / "model"))


@pytest.mark.parametrize("place", ["out", "ck"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_two_runs_in_one_folder(project: Path, options: dict[str, Any], place: str) -> None:
    run = load_config(project / "run.toml")
    if options:
        run_training(run)
    (project / place).mkdir(exist_ok=True)
    before = sorted(project.rglob("*"))
    with alone(project / place) as free:
        assert free
        with pytest.raises(ConfigError, match=f"another run is writing to .*{place}: let it end first"):
            run_training(run, **options)
    assert [path for path in sorted(project.rglob("*")) if path.is_file()] == [
        path for path in before if path.is_file()
    ]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_adapter_is_not_lost_with_a_full_disk(
    project: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    run = load_config(project / "run.toml")
    if not checkpoints:
        run = dataclasses.replace(
            run, training=dataclasses.replace(run.training, checkpoint_dir=None, checkpoint_every=None)
        )
    whole = LoraTrainer.save_adapter
    out = str(project / "out")

    def save(self: LoraTrainer, path: str | Path) -> None:
        if str(path).startswith(out):
            raise OSError(28, "No space left on device")
        whole(self, path)

    monkeypatch.setattr(LoraTrainer, "save_adapter", save)
    (project / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(project / "tmp"))
    with pytest.raises(TrainingError, match="No space left on device") as caught:
        run_training(run)
    rescued = list((project / "tmp").glob("*/adapter/adapter_model.safetensors"))
    if checkpoints:
        assert "run it again with --resume" in str(caught.value)
        assert not rescued
    else:
        (file,) = rescued
        assert f"The adapter is in {file.parent}: move it" in str(caught.value)
        assert file.parent.parent.stat().st_mode & 0o777 == 0o700


def test_a_tokenizer_that_finds_the_disk_full(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers raises a bare Exception."""

    def save(*arguments: object, **options: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", save)
    with pytest.raises(ConfigError, match="cannot be written: a tokenizer cannot be written: No space left"):
        export_adapter(str(trained / "model"), trained / "out" / "adapter", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_put_in_place_of_another_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    for folder in (made, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    replace = Path.replace

    def fail(self: Path, other: Path) -> Path:
        if self == made:
            raise OSError(5, "Input/output error")
        return replace(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            put_directory(made, target)
    assert (target / "name").read_text() == "target"
    put_directory(made, target)
    assert (target / "name").read_text() == "made"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_keys_are_made_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half that is left would be in the way of the next attempt."""
    write = key_files.write_parts
    for whole in range(4):
        calls = itertools.count()

        def full(path: Any, parts: Any, *, secret: bool, whole: int = whole, calls: Any = calls) -> None:
            if next(calls) == whole:
                raise KeyFileError("cannot write the key file: No space left on device")
            write(path, parts, secret=secret)

        monkeypatch.setattr(key_files, "write_parts", full)
        done = CliRunner().invoke(cli, ["keys", str(tmp_path / "keys")])
        assert isinstance(done.exception, KeyFileError)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_keys_of_the_other_side(trained: Path, tmp_path: Path) -> None:
    from ciphertune_zmq import ZmqServeOptions
    from ciphertune_zmq.address import parse
    from ciphertune_zmq.security import client_curve, server_curve

    address = parse("127.0.0.1:5555")
    for source, target in (("worker.key", "client.key"), ("clients/client.pub", "worker.pub")):
        shutil.rmtree(tmp_path / "keys", ignore_errors=True)
        shutil.copytree(trained / "keys", tmp_path / "keys")
        shutil.copy(tmp_path / "keys" / source, tmp_path / "keys" / target)
        options = choose(f"mlwe+zmq://127.0.0.1:5555?curve={tmp_path / 'keys'}").transport.options
        with pytest.raises(KeyFileError, match=r"client\.key and .*worker\.pub are of one pair"):
            client_curve(address, options)
    shutil.copy(trained / "keys" / "client.key", tmp_path / "keys" / "worker.key")
    with pytest.raises(KeyFileError, match=r"worker\.key is the key of a client"):
        server_curve(address, ZmqServeOptions(curve=str(tmp_path / "keys")))


def test_what_nobody_expected_is_one_line_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise errors.pop()

    monkeypatch.delenv("CIPHERTUNE_TRACEBACK", raising=False)
    monkeypatch.setattr(click.Group, "invoke", fail)
    errors: list[Exception] = [KeyError("the patient's name"), MemoryError(), RuntimeError("DefaultCPUAllocator: no")]
    errors.append(UnicodeEncodeError("ascii", "the patient", 0, 1, "ordinal not in range"))
    for said in (
        "PYTHONUTF8=1",
        "not enough memory",
        "not enough memory",
        r"a fault of CipherTune itself: KeyError at cases/test_",
    ):
        with pytest.raises(SystemExit):
            main(["backends"])
        line = capsys.readouterr().err
        assert re.search(said, line)
        assert "patient" not in line
    monkeypatch.setenv("CIPHERTUNE_TRACEBACK", "1")
    errors.append(KeyError("x"))
    with pytest.raises(KeyError):
        main(["backends"])


@pytest.mark.slow
def test_sigterm_leaves_nothing_half_written(project: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        import ciphertune.bundle.writer as writer
        from ciphertune.cli import main

        writer.sync_tree = lambda folder: os.kill(os.getpid(), signal.SIGTERM)
        main(["split", "model", "bundle"])
    """
    done = warm.run(textwrap.dedent(code), preload=warm.CLIENT, cwd=project)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in project.iterdir()} == {"model", "run.toml", "text.txt"}
