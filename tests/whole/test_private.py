"""Adapters trained with differential privacy beside outsourced layers: the example, and its gradients by sample."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ciphertune

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    # Not imported here: that takes seconds, in every process that collects tests.
    pytest.mark.skipif(find_spec("opacus") is None, reason='pip install "ciphertune[private]"'),
]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names of the example."""
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "private.py"))


def test_the_example_prints_its_epsilon(
    example: dict[str, Any], capsys: pytest.CaptureFixture[str], empty_cache: Any
) -> None:
    epsilon = example["train"]("mlwe", epochs=2, noise=1.0, clip=1.0, delta=1e-3, samples=120)
    shown = capsys.readouterr().out
    assert "epoch 2: loss" in shown
    assert f"epsilon {epsilon:.2f} at delta 0.001" in shown
    assert 1 < epsilon < 10


def test_gradients_by_sample_are_those_of_each_sample_alone() -> None:
    """Opacus reads inputs and output gradients of the adapters; outsourced layers between them change nothing."""
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).requires_grad_(False)
    ciphertune.outsource(network, "clear", "all")
    model = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    private = GradSampleModule(model)
    x, target = torch.randn(5, 8), torch.arange(5) % 3
    nn.functional.cross_entropy(private(x), target).backward()
    found = {name: p.grad_sample.clone() for name, p in private.named_parameters() if p.requires_grad}
    assert len(found) == 4
    for number in range(5):
        private.zero_grad()
        loss = nn.functional.cross_entropy(private(x[number : number + 1]), target[number : number + 1])
        loss.backward()
        for name, parameter in private.named_parameters():
            if parameter.requires_grad:
                assert torch.allclose(found[name][number], parameter.grad, rtol=1e-4, atol=1e-6), name
    ciphertune.session_of(model).close()
