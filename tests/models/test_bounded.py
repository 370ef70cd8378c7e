"""What a configuration makes transformers build is bounded, whatever its numbers say."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ciphertune.errors import ConfigError
from ciphertune.models import bounded as bounds
from ciphertune.models.bounded import bounded, refuse_meta_buffers
from ciphertune.models.skeleton import build

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


class Table(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, 4))
        places = torch.outer(torch.arange(rows).float(), torch.ones(4))
        self.register_buffer("table", torch.cat([places.cos(), places.sin()]), persistent=False)


def test_what_fits_is_as_it_is_without_bounds() -> None:
    with bounded():
        torch.manual_seed(0)
        made, drawn = Table(30), torch.rand(3)
    torch.manual_seed(0)
    plain = Table(30)
    assert torch.equal(drawn, torch.rand(3))
    for (name, tensor), (_, other) in zip(made.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(tensor, other), name
    refuse_meta_buffers(made)


@pytest.mark.parametrize("rows", [1 << 20, 1 << 40])
def test_a_buffer_that_does_not_fit_is_never_allocated(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(bounds, "ROOM", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with bounded():
        made = Table(rows)
    assert made.weight.is_meta
    with pytest.raises(ConfigError, match="describes a buffer 'table' of shape .* may take 1 MiB"):
        refuse_meta_buffers(made)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 10  # KiB


def test_memory_that_is_given_back_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "ROOM", 3 << 20)
    with bounded():
        for _ in range(20):
            assert not torch.ones(1 << 18).is_meta
        kept = [torch.ones(1 << 18) for _ in range(4)]
    assert [tensor.is_meta for tensor in kept] == [False, False, False, True]


def test_modules_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_MODULES", 100)
    with pytest.raises(ConfigError, match="more than 100 modules"), bounded():
        nn.ModuleList(nn.Linear(1, 1) for _ in range(1 << 30))
    nn.ModuleList(nn.Linear(1, 1) for _ in range(200))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1 << 24}, "modules"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "num_hidden_layers": 1 << 24}, "modules"),
        ({"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"], "n_positions": 1 << 30, "n_layer": 1}, "config"),
        ({"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_positions": 1 << 30, "n_layer": 1}, "config"),
        ({"head_dim": 1 << 31}, "buffer"),
    ],
)
def test_models_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(bounds, "MOST_MODULES", 1000)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=said):
        build(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 << 20  # KiB
