"""YAML files that ``trl sft --config`` takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.runs.config import TrainConfig
from ciphertune.runs.trl import _ASIDE, _MATTERS, _READ, _SAME, load_trl

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PUBLIC = """
# Model arguments
model_name_or_path: model
dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
lora_r: 4
lora_alpha: 8
lora_dropout: 0.0
lora_target_modules: [q_proj, k_proj]

# Dataset arguments
dataset_name: chats.jsonl
dataset_num_proc: 4

# Training arguments
max_length: 60
learning_rate: 2e-2
lr_scheduler_type: cosine
warmup_ratio: 0.1
num_train_epochs: 2.0
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
gradient_checkpointing: true
logging_steps: 5
eval_strategy: "no"
save_strategy: epoch
save_total_limit: 1
bf16: true
optim: adamw_torch
report_to: [trackio]
push_to_hub: true
output_dir: tuned
seed: 7
"""


def load(folder: Path, text: str, said: list[str] | None = None) -> TrainConfig:
    (folder / "sft.yaml").write_text(text)
    return load_trl(folder / "sft.yaml", None if said is None else said.append)


def test_a_file_as_people_have_it(project: Path) -> None:
    from tiny import TEMPLATE

    (project / "model" / "chat_template.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    (project / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(16)))
    (project / "sft.yaml").write_text(PUBLIC)
    done = CliRunner().invoke(
        cli, ["train", str(project / "sft.yaml"), "--to", "mlwe", "--json"], catch_exceptions=False
    )
    result = json.loads(done.stdout)
    assert result["steps"] == 4
    assert result["losses"][-1] < result["losses"][0]
    assert result["to"] == "mlwe"
    assert (
        "sft.yaml: of no use here: dtype, attn_implementation, dataset_num_proc, gradient_checkpointing, "
        "logging_steps, bf16, report_to, push_to_hub"
    ) in done.stderr
    assert "will differ" not in done.stderr
    stated = json.loads((project / "tuned" / "adapter" / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], sorted(stated["target_modules"])) == (4, 8, ["k_proj", "q_proj"])
    assert (project / "tuned" / "checkpoints" / "checkpoint-4").exists()
    config = load(project, PUBLIC)
    assert (config.training.schedule, config.training.warmup_steps, config.training.seed) == ("cosine", 0.1, 7)
    assert config.data.held_out == 0.0


def test_what_is_left_out_is_as_in_trl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    said: list[str] = []
    config = load(tmp_path, "model_name_or_path: m\ndataset_name: a.jsonl\n", said)
    assert said == [
        "sft.yaml: not done here, so that the result will differ from TRL's: use_peft: false (adapters are trained, "
        "never all weights)"
    ]
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32.0, 0.05)
    assert (config.data.length, config.data.batch_size, config.data.packing) == (1024, 8, False)
    assert (config.training.learning_rate, config.training.epochs, config.training.schedule) == (2e-5, 3, "linear")
    assert config.training.checkpoint_every == 500
    assert config.training.output == str(tmp_path / "trainer_output")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_defaults_and_keys_are_those_of_the_installed_trl() -> None:
    trl = pytest.importorskip("trl")
    fields = {
        field.name: field.default
        for owner in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
        for field in dataclasses.fields(owner)
    }
    own = {
        "dataset_text_field": None,
        "output_dir": "trainer_output",
        "pad_to_multiple_of": None,
        "model_name_or_path": None,
    }
    for key, (_, _, default) in _SAME.items():
        wanted = fields[key] if fields[key] is not None else default
        assert default == own.get(key, wanted), key
    assert [key for key in _MATTERS if key in fields and fields[key] not in (*_MATTERS[key], None, "bfd")] == []
    assert set(fields) - {*_SAME, *_READ, *_MATTERS, *_ASIDE} == set()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("max_lenght: 9", r"unknown key 'max_lenght'; did you mean 'max_length'"),
        ("max_length: null", "max_length must be set here"),
        ("max_length: 1", "max_length must be 2 or more, not 1"),
        ("learning_rate: fast", "learning_rate must be a number, not 'fast'"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type: 'polynomial' is not done here"),
        ("num_train_epochs: 0.5", "num_train_epochs: 0.5 is no whole number"),
        ("save_steps: 0.1", "save_steps must be a whole number of steps here, not 0.1"),
        ("eval_strategy: epoch\ndataset_test_split: test", "the test split cannot be read from here"),
        ("dataset_name: owner/none.jsonl", "there is no file or folder 'owner/none.jsonl'"),
        ("dataset_name: data/none", "there is no file or folder 'data/none'"),
        ("dataset_name: ../none", "there is no file or folder '../none'"),
        ("datasets: [{path: a}, {path: b}]", "datasets must be a list of one"),
        ("resume_from_checkpoint: x", "run 'ciphertune train FILE --resume'"),
        ("lora_r: 0", "lora_r must be 1 or more"),
        ("- a", "is not YAML"),
    ],
)
def test_mistakes_are_named_in_the_words_of_the_file(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "data").mkdir()
    first = "" if lines.startswith("dataset") and "_name" in lines else "dataset_name: a.jsonl\n"
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, f"model_name_or_path: m\n{first}{lines}\n")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "caf\xe9: \x00"])
def test_files_that_hold_no_keys(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"sft\.yaml (holds no keys|is not YAML)"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("dataset_name: owner/name", {"source": "hub:owner/name"}),
        ("dataset_name: owner/name\ndataset_config: en", {"source": "hub:owner/name/en"}),
        ("datasets: [{path: json, data_files: [data/b.json], split: all}]", {"source": "data/b.json", "split": "all"}),
        ("datasets: [{path: data, data_files: b.json}]", {"source": "data/b.json"}),
        ("dataset_name: data\npacking: true\nlora_target_modules: all-linear", {"source": "data", "packing": True}),
    ],
)
def test_data_sets(tmp_path: Path, lines: str, wanted: dict[str, Any]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.json").write_text("[]")
    data = load(tmp_path, f"model_name_or_path: m\nuse_peft: true\n{lines}\n").data
    source = wanted.pop("source")
    assert data.source == (source if source.startswith("hub:") else str(tmp_path / source))
    assert {name: getattr(data, name) for name in wanted} == wanted


def test_what_would_change_the_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    said: list[str] = []
    text = (
        "model_name_or_path: m\ndataset_name: a.jsonl\nuse_peft: true\noptim: adafactor\nuse_dora: true\n"
        "packing: true\nneftune_noise_alpha: 5\nuse_rslora: false\nadam_epsilon: 1e-8\npacking_strategy: bfd\n"
    )
    load(tmp_path, text, said)
    assert said == [
        "sft.yaml: not done here, so that the result will differ from TRL's: optim: adafactor, use_dora: True, "
        "neftune_noise_alpha: 5, packing_strategy: bfd"
    ]
