"""Training runs from TOML files."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ciphertune.cli import cli
from ciphertune.errors import ConfigError, SelectionError
from ciphertune.plugins.manager import plugin_manager
from ciphertune.runs.config import DataSection, load_config, parse_config
from ciphertune.runs.task import read_source
from ciphertune.runs.train import run_training

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

GOOD: dict[str, Any] = {"model": {"name": "m"}, "data": {"source": "d"}, "training": {"output": "o"}}


def changed(section: str | None, **values: Any) -> dict[str, Any]:
    if section is None:
        return {**GOOD, **values}
    return {**GOOD, section: {**GOOD.get(section, {}), **values}}


def test_defaults_and_conversion() -> None:
    config = parse_config(changed("training", learning_rate=1, max_grad_norm=2))
    assert config.to == "mlwe"
    assert config.training.learning_rate == 1.0
    assert config.training.max_grad_norm == 2.0
    assert config.lora.target_modules is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(None, modle={}), "unknown key or section 'modle'; did you mean 'model'"),
        (changed("training", learning_rat=1.0), "unknown key 'training.learning_rat'; did you mean 'learning_rate'"),
        (changed("training", steps="ten"), "training.steps must be a whole number, not 'ten'"),
        (changed("training", steps=True), "training.steps must be a whole number, not True"),
        (changed("training", schedule="square"), "training.schedule must be one of constant, linear, cosine"),
        (changed("lora", target_modules="q_proj"), "lora.target_modules must be a list of strings"),
        (changed("lora", r=0), "lora.r must be 1 or more"),
        (changed("data", held_out=1.0), "data.held_out must be from 0 to below 1"),
        (changed("lora", alpha=0), "lora.alpha must be a finite number above 0"),
        (changed("lora", target_modules=[]), "lora.target_modules must be one name or more"),
        (changed("training", learning_rate=float("inf")), "training.learning_rate must be a finite number above 0"),
        (changed("training", learning_rate=float("nan")), "training.learning_rate must be a finite number above 0"),
        (changed("training", learning_rate=10**400), "training.learning_rate is too large a number"),
        (changed("training", weight_decay=-0.1), "training.weight_decay must be a finite number from 0"),
        (changed("training", steps=0), "training.steps must be 1 or more"),
        (changed("training", epochs=0), "training.epochs must be 1 or more"),
        (changed("training", accumulation=0), "training.accumulation must be 1 or more"),
        (
            changed("training", accumulation=2, interleave=3),
            "training.interleave must be from 1 to accumulation, which is 2, not 3",
        ),
        (changed("training", max_grad_norm=0.0), "training.max_grad_norm must be above 0"),
        (changed("training", eval_every=0), "training.eval_every must be 1 or more"),
        (changed("training", checkpoint_dir="c", checkpoint_every=0), "training.checkpoint_every must be 1 or more"),
        (changed("training", checkpoint_every=5), "training.checkpoint_every is set but checkpoint_dir is not"),
        ({**GOOD, "data": 3}, r"\[data\] must be a section"),
        ({k: v for k, v in GOOD.items() if k != "model"}, "model is missing"),
        ({**GOOD, "data": {}}, "data.source is missing"),
    ],
)
def test_mistakes_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(content)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("training.steps = " + "9" * 5000)
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)
    path.write_text("to = [")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)


def test_the_example_is_valid() -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "train.toml")
    assert config.model.name == "smollm2"
    assert config.training.steps


def texts_of(source: Path | str) -> list[str]:
    data = DataSection(str(source))
    return [row.fields["text"] for row in read_source(data, data.source).rows]


def test_texts_from_files_folders_and_json_lines(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.md").write_text("two")
    (folder / "c.bin").write_bytes(b"\xff\xfe")
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"text": "three"}\n\n{"text": "four"}\n')
    assert texts_of(folder) == ["one", "two"]
    assert texts_of(lines) == ["three", "four"]
    assert texts_of(folder / "a.txt") == ["one"]
    assert len(texts_of("language-reference")) > 50
    with pytest.raises(ConfigError, match=r"cannot read data\.source"):
        texts_of(folder / "none.txt")
    with pytest.raises(ConfigError, match=r"cannot read data\.source"):
        texts_of(folder / "c.bin")
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="holds no text"):
        texts_of(folder / "a.txt")


def test_a_run_trains_saves_and_resumes_exactly(project: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = load_config(project / "run.toml")
    whole = run_training(config)
    assert whole.steps == 8
    assert whole.losses[-1] < whole.losses[0]
    assert [entry["step"] for entry in whole.evaluations] == [0, 4, 8]
    written = json.loads((project / "out" / "result.json").read_text())
    assert written["losses"] == whole.losses
    assert written["config"]["model"]["name"].endswith("model")
    assert (project / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in (project / "out").iterdir()} == {"adapter", "loss.png", "report.html", "result.json"}
    base = AutoModelForCausalLM.from_pretrained(project / "model")
    loaded = PeftModel.from_pretrained(base, whole.adapter)
    assert any(p.abs().sum() > 0 for n, p in loaded.named_parameters() if "lora_B" in n)

    # A run whose process ended after the first checkpoint goes on as if nothing had happened.
    (project / "ck" / "checkpoint-8").rename(project / "gone")
    again = run_training(config, resume=True)
    assert again.losses == whole.losses
    with pytest.raises(ConfigError, match=r"result\.json is of an earlier run: .*--overwrite, or .*--resume"):
        run_training(config)
    assert run_training(config, overwrite=True).losses == whole.losses


def test_a_run_under_encryption_follows_the_one_in_the_clear(project: Path) -> None:
    config = load_config(project / "run.toml")
    free = dataclasses.replace(
        config, training=dataclasses.replace(config.training, checkpoint_dir=None, checkpoint_every=None)
    )
    clear = run_training(free)
    encrypted = run_training(dataclasses.replace(free, to="mlwe"), overwrite=True)
    assert encrypted.security_bits == 130.2
    assert max(abs(a - b) for a, b in zip(clear.losses, encrypted.losses, strict=True)) < 0.02
    assert clear.losses != encrypted.losses
    with pytest.raises(SelectionError):
        run_training(dataclasses.replace(free, to="mlwe?bits=1"), overwrite=True)
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_training(free, resume=True)


def test_a_model_that_is_not_there(project: Path) -> None:
    config = load_config(project / "run.toml")
    with pytest.raises(ConfigError, match="cannot load the model"):
        run_training(dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(project / "out2"))))


@pytest.mark.parametrize(
    "name",
    [
        "./mine",
        "/private/mine",
        "a/b/c",
        "../mine",
        "run.toml",
        "patients.safetensors",
        "smolm2",
        "SmolLM-2",
        "here/mine",
    ],
)
@pytest.mark.parametrize("task", ["language", "classification"])
def test_a_private_name_is_not_sent_to_a_hub(
    tmp_path: Path, name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a.csv").write_text("text,label\none,a\ntwo,b\nthree,a\n")
    asked: list[Any] = []
    for loader in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", lambda *a, **k: asked.append(a))
    content = {"task": task, "model": {"name": name}, "data": {"source": "a.csv"}, "training": {"output": "o"}}
    with pytest.raises(
        ConfigError, match=r"cannot load the model .*there is no such folder; .*not looked for on a hub"
    ):
        run_training(parse_config(content))
    assert asked == []


def test_plugins_of_the_file_and_of_the_command_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project / "run.toml"
    file.write_text('plugins = ["history?path=out/history.csv"]\n' + file.read_text())
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    arguments = ["train", str(file), "--json", "--plugin", "traffic?path=t.json", "--plugin", "tensorboard?folder=tb"]
    before = plugin_manager().names()
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    result = json.loads(done.stdout)
    assert plugin_manager().names() == before
    rows = list(csv.DictReader((project / "out" / "history.csv").read_text().splitlines()))
    steps = [row for row in rows if row["kind"] == "step"]
    assert [float(row["loss"]) for row in steps] == result["losses"]
    measured = [row for row in rows if row["kind"] == "evaluation"]
    assert [float(row["perplexity"]) for row in measured] == [e["perplexity"] for e in result["evaluations"]]
    assert sum(int(row["bytes_up"]) for row in rows) == result["traffic"]["bytes_up"]
    total = json.loads((elsewhere / "t.json").read_text())["total"]
    assert {name: total[name] for name in result["traffic"]} == pytest.approx(result["traffic"])
    assert list((elsewhere / "tb").iterdir())

    (project / "ck" / "checkpoint-8").rename(project / "gone")
    done = CliRunner().invoke(cli, ["train", str(file), "--json", "--resume"], catch_exceptions=False)
    assert json.loads(done.stdout)["losses"] == result["losses"]
    again = list(csv.DictReader((project / "out" / "history.csv").read_text().splitlines()))
    assert [(row["kind"], row["step"], row["loss"]) for row in again] == [
        (row["kind"], row["step"], row["loss"]) for row in rows
    ]


def test_a_misspelt_plugin_is_an_error_before_the_model_is_loaded(project: Path) -> None:
    shutil.rmtree(project / "model")
    for plugin, message in (("histroy?path=a.csv", "did you mean 'history'"), ("history?path=a.txt", "must end in")):
        with pytest.raises(SelectionError, match=message):
            CliRunner().invoke(
                cli, ["train", str(project / "run.toml"), "--plugin", plugin], catch_exceptions=False,
                standalone_mode=False,
            )  # fmt: skip
