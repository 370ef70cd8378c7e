"""Runs of a model with convolutions, from a file: outsourced as patches where the file says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from ciphertune.errors import ConfigError, NothingOutsourcedError
from ciphertune.runs.config import load_config, parse_config
from ciphertune.runs.train import run_training


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small CANINE, which reads letters by convolutions, and notes to classify."""
    import transformers

    torch.manual_seed(3)
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=128,
        num_hash_buckets=64, num_labels=2, local_transformer_stride=32,
    )  # fmt: skip
    model: Any = transformers.CanineForSequenceClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    tiny.save_letters(tmp_path / "model")
    rows = [{"text": "no fever" if n % 2 else "high fever", "label": "well" if n % 2 else "ill"} for n in range(8)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(project: Path, line: str) -> Any:
    file = project / "run.toml"
    file.write_text(
        f'task = "classification"\nto = "clear"\n{line}\n[model]\nname = "model"\n[data]\nsource = "notes.jsonl"\n'
        "length = 128\nheld_out = 0\nbatch_size = 2\n[lora]\n"
        'target_modules = ["initial_char_encoder.layer.0.attention.self.query"]\n'
        '[training]\noutput = "out"\nsteps = 1\n'
    )
    return run_training(load_config(file), overwrite=True)


def test_convolutions_are_outsourced_where_the_file_says_so(project: Path) -> None:
    without = run(project, "")
    named = run(project, 'convolutions = ["chars_to_molecules.conv"]')
    assert named.outsourced_fraction > without.outsourced_fraction
    assert named.losses == pytest.approx(without.losses, rel=1e-4)
    with pytest.raises(NothingOutsourcedError, match="its patches cost more than it saves"):
        run(project, "convolutions = true")


def test_what_is_no_choice_of_convolutions() -> None:
    with pytest.raises(ConfigError, match="convolutions"):
        parse_config({"convolutions": 3, "model": {"name": "m"}, "data": {"source": "s"}, "training": {"output": "o"}})
