"""Runs for each task, from a file of ten lines: in the clear, in simulation, encrypted."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import TEMPLATE

from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.runs.config import load_config
from ciphertune.runs.train import RunResult, run_training

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "a number."}]}
    for n in range(24)
]
ASKED = [{"instruction": f"Name {n}", "input": "loud" * (n % 2), "output": "a number."} for n in range(24)]
TEXTS = [{"body": "the quick brown fox jumps over the lazy dog. " * 3} for _ in range(24)]


def labelled(count: int) -> str:
    rows = [("no fever", "well") if n % 3 else ("high fever", "ill") for n in range(count)]
    return "note;state\n" + "".join(f"{text} {n};{label}\n" for n, (text, label) in enumerate(rows))


def write(folder: Path, text: str, **sections: str) -> Path:
    file = folder / "task.toml"
    whole = {"model": 'name = "model"', "training": 'output = "o"\nepochs = 2\nlearning_rate = 2e-2', **sections}
    file.write_text(text + "".join(f"\n[{name}]\n{content}" for name, content in whole.items()))
    return file


def run(file: Path, *, said: list[str] | None = None, **options: Any) -> RunResult:
    lines: list[str] = [] if said is None else said
    return run_training(load_config(file), progress=lines.append, **options)


def with_template(project: Path) -> None:
    (project / "model" / "chat_template.jinja").write_text(TEMPLATE)


MODES = ("clear", "simulation", "mlwe")


@pytest.mark.parametrize("to", MODES)
@pytest.mark.parametrize(
    ("name", "content", "more", "note"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, CHATS)), "", "24 conversations, learned whole"),
        ("a.json", json.dumps(ASKED), "", "24 instructions with answers, learned from the completions alone"),
        ("a.jsonl.gz", "\n".join(map(json.dumps, TEXTS)), 'dataset_text_field = "body"\n', "24 texts, learned whole"),
    ],
)
def test_a_language_model_learns(project: Path, to: str, name: str, content: str, more: str, note: str) -> None:
    with_template(project)
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    (project / name).write_bytes(packed)
    said: list[str] = []
    file = write(project, f'to = "{to}"', data=f'source = "{name}"\nmax_length = 60\n{more}')
    result = run(file, said=said)
    assert f"Data: {note}" in said
    assert result.evaluations[0]["step"] == 0
    assert result.evaluations[-1]["eval_loss"] < result.evaluations[0]["eval_loss"]
    assert (result.security_bits or 0) > 100 if to == "mlwe" else result.security_bits is None


@pytest.mark.parametrize("to", MODES)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_a_classifier_learns(project: Path, to: str, model: str) -> None:
    """The saved adapter names its labels, and stock libraries load it and answer alike."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if model == "bert":
        encoder(project)
    (project / "a.csv").write_text(labelled(48))
    file = write(
        project,
        f'task = "classification"\nto = "{to}"',
        data='source = "a.csv"\ntext_field = "note"\nlabel_field = "state"\nlength = 24\nheld_out = 0.25',
    )
    result = run(file)
    last = result.evaluations[-1]
    assert last["eval_accuracy"] == 1.0
    assert last["eval_f1"] == 1.0
    assert result.evaluations[0]["eval_accuracy"] < 1.0
    config = AutoConfig.from_pretrained(result.adapter)
    assert config.id2label == {0: "ill", 1: "well"}
    base = AutoModelForSequenceClassification.from_pretrained(project / "model", config=config)
    tuned = PeftModel.from_pretrained(base, result.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "model")
    for text, label in (("no fever 5", "well"), ("high fever 3", "ill")):
        with torch.no_grad():
            logits = tuned(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
        assert config.id2label[int(logits.argmax())] == label


def encoder(project: Path, **sizes: Any) -> None:
    """In place of the project's model an encoder without a head, as sentence encoders come."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 48, "max_position_embeddings": 64, **sizes}
    for file in (project / "model").glob("*.safetensors"):
        file.unlink()
    BertModel(BertConfig(**small), add_pooling_layer=False).save_pretrained(project / "model")


def test_a_classifier_is_trained_further(project: Path) -> None:
    """From the adapter, with its head and its labels, though the rows name but some of them."""
    encoder(project)
    data = 'source = "a.csv"\ntext_field = "note"\nlabel_field = "state"\nlength = 24\nheld_out = 0.25'
    (project / "a.csv").write_text(labelled(48) + "nothing;unknown\n" * 8)
    first = run(write(project, 'task = "classification"\nto = "clear"', data=data))
    (project / "a.csv").write_text(labelled(48))
    again = write(
        project,
        'task = "classification"\nto = "simulation"',
        model='name = "model"\nadapter = "o/adapter"',
        data=data,
        training='output = "p"\nsteps = 1\nlearning_rate = 1e-4',
    )
    further = run(again)
    assert further.evaluations[0]["eval_accuracy"] == 1.0
    assert further.evaluations[0]["eval_loss"] == pytest.approx(first.evaluations[-1]["eval_loss"], abs=0.05)
    assert json.loads((project / "p" / "adapter" / "config.json").read_text())["id2label"] == {
        "0": "ill",
        "1": "unknown",
        "2": "well",
    }
    (project / "a.csv").write_text(labelled(48).replace("well", "fine"))
    with pytest.raises(ConfigError, match=r"tells ill, unknown, well apart, and the data has fine, ill"):
        run(again, overwrite=True)


def test_an_adapter_is_trained_further(project: Path) -> None:
    data = 'source = "text.txt"\nlength = 16'
    first = run(write(project, 'to = "clear"', data=data))
    model = 'name = "model"\nadapter = "o/adapter"'
    training = 'output = "p"\nsteps = 2\nlearning_rate = 1e-3'
    file = write(project, 'to = "mlwe"', model=model, data=data, training=training)
    further = run(file)
    assert further.evaluations[0]["eval_loss"] == pytest.approx(first.evaluations[-1]["eval_loss"], abs=0.02)
    assert further.evaluations[-1]["eval_loss"] < first.evaluations[0]["eval_loss"]
    with pytest.raises(ConfigError, match=r"\[lora\] is for a new adapter"):
        run(write(project, "", model=model, data=data, training=training, lora="r = 4"), overwrite=True)


def _damage(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, r"model\.adapter: cannot read .*adapter_config\.json: No such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"holds no adapter_model\.safetensors"),
        (lambda f: _damage(f, "adapter_config.json", task_type="SEQ_CLS"), "was trained for the task SEQ_CLS"),
        (lambda f: _damage(f, "adapter_config.json", peft_type="HIRA"), "is of HIRA, which cannot be loaded here"),
        (lambda f: _damage(f, "adapter_config.json", peft_type="QLORAX"), "which the installed peft does not know"),
        (lambda f: _damage(f, "adapter_config.json", r=3), "size mismatch"),
        (lambda f: _damage(f, "adapter_config.json", target_modules=["q_proj", "o_proj"]), "missing adapter keys"),
        (lambda f: _damage(f, "adapter_config.json", target_modules=["c_attn"]), "c_attn"),
    ],
)
def test_an_adapter_that_does_not_fit(project: Path, change: Callable[[Path], Any], said: str) -> None:
    data = 'source = "text.txt"\nlength = 16'
    run(write(project, 'to = "clear"', data=data, training='output = "o"\nsteps = 1'))
    change(project / "o" / "adapter")
    file = write(
        project,
        'to = "clear"',
        model='name = "model"\nadapter = "o/adapter"',
        data=data,
        training='output = "p"\nsteps = 1',
    )
    with pytest.raises(ConfigError, match=said):
        run(file)


def test_adapters_on_every_linear_layer(project: Path) -> None:
    result = run(
        write(
            project,
            'to = "simulation"',
            data='source = "text.txt"\nlength = 16',
            lora='target_modules = "all-linear"',
            training='output = "o"\nsteps = 1',
        )
    )
    targets = json.loads(Path(result.adapter, "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_by_default_adapters_are_where_peft_has_them(project: Path) -> None:
    from tiny import gpt2

    data = 'source = "text.txt"\nlength = 16'
    for expected in (["q_proj", "v_proj"], ["c_attn"]):
        result = run(write(project, 'to = "clear"', data=data, training='output = "o"\nsteps = 1'), overwrite=True)
        targets = json.loads(Path(result.adapter, "adapter_config.json").read_text())["target_modules"]
        assert sorted(targets) == expected
        gpt2(vocab_size=97).save_pretrained(project / "model")


def test_rows_of_their_own_to_evaluate_with(project: Path) -> None:
    (project / "held.jsonl").write_text("\n".join(map(json.dumps, TEXTS[:3])))
    (project / "a.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    data = 'source = "a.jsonl"\neval_source = "held.jsonl"\ntext_field = "body"\nlength = 16\npacking = false'
    said: list[str] = []
    run(write(project, 'to = "clear"', data=data, training='output = "o"\nsteps = 1'), said=said)
    assert said[-1].endswith("24 sequences to train on, 3 held out")
    assert "Data: held out: 3 of 3 examples are longer than 16 tokens (the longest has 136) and were cut" in said


@pytest.mark.parametrize(
    ("top", "data", "said"),
    [
        ("", 'source = "a.jsonl"\nlength = 16', r"line 1 of .*a\.jsonl has the field 'messages'|no chat template"),
        ("", 'source = "a.jsonl"\nmax_length = 9\nlength = 8', "two names of one setting"),
        ("", 'source = "a.jsonl"\ncompletion_only_loss = true', "set data.assistant_only_loss"),
        ('task = "classification"', 'source = "text.txt"', "holds texts without labels"),
        ('task = "classification"', 'source = "a.jsonl"', "has no field 'label', but the field 'messages'"),
        ('task = "classification"', 'source = "a.csv"\npacking = true', "data.packing is for language models"),
        ('task = "chat"', 'source = "a.jsonl"', "task must be one of language, classification"),
        ("", 'source = "a.csv"', "line 2 of .*a.csv has the fields 'note', 'state', and none of these is known"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(project: Path, top: str, data: str, said: str) -> None:
    (project / "a.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    (project / "a.csv").write_text(labelled(9))
    if "chat template" not in said:
        (project / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=said):
        run(write(project, top, data=data))


def test_what_an_example_loses_is_said(project: Path) -> None:
    with_template(project)
    (project / "a.json").write_text(json.dumps(ASKED))
    data = 'source = "a.json"\nlength = 30\nheld_out = 0'
    said: list[str] = []
    run(write(project, 'to = "clear"', data=data, training='output = "o"\nsteps = 1'), said=said)
    lost = next(line for line in said if "to train on" in line)
    assert "24 of 24 examples are longer than 30 tokens (the longest has 41) and were cut" in lost
    assert "12 left out, since nothing of them is learned" in lost
    with pytest.raises(
        ConfigError, match=r"no token that is learned lies within the first 9 tokens .* raise data.length"
    ):
        run(write(project, 'to = "clear"', data=data.replace("30", "9")), overwrite=True)


def test_a_tokenizer_of_another_model(project: Path) -> None:
    encoder(project, vocab_size=40)
    (project / "a.csv").write_text(labelled(9).replace("note;state", "text;label"))
    with pytest.raises(ConfigError, match=r"gave token \d+, and the model has embeddings of 40 tokens"):
        run(write(project, 'task = "classification"\nto = "clear"', data='source = "a.csv"\nlength = 16'))


def test_a_model_that_tells_other_labels_apart(project: Path) -> None:
    from tiny import bert

    bert(vocab_size=97, max_position_embeddings=64, id2label={0: "x", 1: "y", 2: "z"}).save_pretrained(
        project / "model"
    )
    (project / "a.csv").write_text(labelled(9).replace("note;state", "text;label"))
    with pytest.raises(ConfigError, match=r"tells x, y, z apart, and the data has ill, well"):
        run(write(project, 'task = "classification"', data='source = "a.csv"'))
    (project / "a.csv").write_text("text;label\n" + "one;z\ntwo;y\n" * 4)
    result = run(
        write(
            project,
            'task = "classification"\nto = "clear"',
            data='source = "a.csv"\nlength = 16',
            training='output = "o"\nsteps = 1',
        )
    )
    assert json.loads(Path(result.adapter, "config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}


def test_a_run_is_not_written_over(project: Path) -> None:
    """Neither results nor checkpoints, before anything is loaded; with --overwrite both."""
    file = project / "run.toml"

    def invoke(*options: str) -> Any:
        return CliRunner().invoke(cli, ["train", str(file), *options], standalone_mode=False)

    assert invoke("--json").exception is None
    whole = (project / "out" / "result.json").read_bytes()
    model = project / "model" / "model.safetensors"
    weights = model.read_bytes()
    model.unlink()
    found = invoke()
    assert isinstance(found.exception, ConfigError)
    assert "out/result.json is of an earlier run: write over it with --overwrite, or go on with it by --resume" in str(
        found.exception
    )
    (project / "out" / "result.json").unlink()
    shutil.rmtree(project / "out" / "adapter")
    assert "checkpoint-8 is of an earlier run" in str(invoke().exception)
    model.write_bytes(weights)
    file.write_text(file.read_text().replace("steps = 8", "steps = 4"))
    done = invoke("--overwrite")
    assert done.exception is None, done.exception
    assert [path.name for path in (project / "ck").iterdir()] == ["checkpoint-4"]
    assert (project / "out" / "result.json").read_bytes() != whole


def test_what_is_printed_of_held_out_data(project: Path) -> None:
    done = CliRunner().invoke(cli, ["train", str(project / "run.toml")], catch_exceptions=False)
    assert "held-out loss, before and after" in done.stdout
    assert "held-out perplexity, before and after" in done.stdout
