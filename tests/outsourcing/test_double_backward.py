"""Gradients of gradients through outsourced layers: the same product once more, in either direction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ciphertune


class Attention(nn.Module):
    """Three layers that read the same input, of which only some may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.k_proj = nn.Linear(6, 4, bias=False)
        self.v_proj = nn.Linear(6, 5)

    def forward(self, x: Tensor, used: str) -> Tensor:
        outputs = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        return torch.cat([outputs[name].tanh() for name in used], dim=-1)


@pytest.mark.parametrize("to", ["clear", "clear?weight_bits=8"])
def test_numerically(to: str) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    model = ciphertune.outsource(layers, to)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    # Products are float32 ones, so steps are wide and tolerances too.
    assert torch.autograd.gradcheck(model, (x,), eps=1e-2, atol=1e-3, rtol=1e-2)
    assert torch.autograd.gradgradcheck(model, (x,), (g,), eps=1e-2, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("used", ["q", "kv", "qkv"])
def test_groups_with_outputs_that_nobody_uses(used: str, recorder: Any) -> None:
    torch.manual_seed(0)
    reference = Attention()
    model = ciphertune.outsource(copy.deepcopy(reference), "clear", plugins=recorder.plugins)
    data = torch.randn(2, 3, 6)
    results = []
    for each in (model, reference):
        x = data.clone().requires_grad_()
        y = each(x, used)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), x)
        results.append((first, second, third))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    # One product for all layers of the group, whichever way.
    assert {exchange.layers for exchange in recorder.answered} == {("q_proj", "k_proj", "v_proj")}


def test_the_gradient_of_the_gradient_alone() -> None:
    torch.manual_seed(0)
    reference = nn.Linear(6, 5)
    model = ciphertune.outsource(nn.Sequential(copy.deepcopy(reference)), "clear")
    x, g = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x), x, g, create_graph=True)
    direction = torch.randn(3, 6)
    (by_g,) = torch.autograd.grad(gradient, g, direction)
    torch.testing.assert_close(by_g, direction @ reference.weight.t())


@pytest.mark.parametrize("to", ["simulation", "mlwe"])
def test_a_gradient_penalty_under_encryption(to: str) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))
    model = ciphertune.outsource(copy.deepcopy(reference), to, layers=["2"])
    results = []
    for each in (model, reference):
        x = torch.linspace(-1, 1, 64).reshape(4, 16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            (gradient,) = torch.autograd.grad(each(x).sum(), x, create_graph=True)
        (gradient.norm(dim=1) - 1).square().sum().backward()
        results.append((x.grad, each[0].weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_under_autocast() -> None:
    torch.manual_seed(0)
    model = ciphertune.outsource(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), "clear", layers=["0"])
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(model(x).float().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    inside = x.grad.clone()
    x.grad = None
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    torch.testing.assert_close(inside, x.grad, rtol=0.05, atol=0.02)
