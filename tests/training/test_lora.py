"""Adapters on models in the clear and outsourced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.training.lora import add_lora, load_adapter
from ciphertune.training.targets import all_linear

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("llama", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_all_linear_layers_are_the_same_after_outsourcing(
    tiny: Callable[[str], Any], kind: str, wanted: list[str]
) -> None:
    assert all_linear(tiny(kind)) == wanted
    model = ciphertune.outsource(tiny(kind), to="clear")
    assert all_linear(model) == wanted
    ciphertune.session_of(model).close()


def test_all_linear_layers_of_a_classifier_are_those_of_its_encoder(tiny: Callable[[str], Any]) -> None:
    found = all_linear(tiny("bert"))
    assert all(name.startswith("bert.") for name in found) or "classifier" not in found
    assert any(name.endswith("query") for name in found)


def test_an_adapter_is_loaded_on_an_outsourced_model(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """As with the client's part of a bundle; what is trained are the adapter's tensors, as they were saved."""
    first: Any = add_lora(tiny("llama"), seed=1, rank=2, targets="all-linear")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    first.save_pretrained(tmp_path / "adapter")
    model: Any = load_adapter(ciphertune.outsource(tiny("llama"), to="clear"), str(tmp_path / "adapter"), None)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, first.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    ciphertune.session_of(model).close()


def test_an_adapter_for_another_task_is_refused(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model: Any = add_lora(tiny("llama"), seed=1, rank=2, targets=None)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="was trained for the task of a language model, and this run is for SEQ_CLS"):
        load_adapter(tiny("bert"), str(tmp_path), "SEQ_CLS")
