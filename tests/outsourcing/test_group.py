"""Layers that read the same input: one product for all, and the right results where they turn out not to."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ciphertune

Tiny = Callable[[str], nn.Module]


class Attention(nn.Module):
    """Projections of three sizes; what they read and what is used of them can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.k_proj = nn.Linear(6, 4, bias=False)
        self.v_proj = nn.Linear(6, 5)

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x if k is None else k), self.v_proj(x if v is None else v)


GROUP = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def clear_model() -> Attention:
    torch.manual_seed(0)
    return Attention()


@pytest.fixture
def model(clear_model: Attention, recorder: Any) -> Attention:
    return ciphertune.outsource(copy.deepcopy(clear_model), "clear", plugins=recorder.plugins)


def loss(outputs: Any) -> Tensor:
    return sum((output.square().sum() for output in outputs), torch.zeros(()))


def same(model: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    """Outputs and gradients of both, for the same inputs."""
    ours = [x.detach().clone().requires_grad_() for x in inputs]
    theirs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs, expected = model(*ours), reference(*theirs)
    loss(outputs).backward()
    loss(expected).backward()
    torch.testing.assert_close(outputs, expected)
    for ours_x, theirs_x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_x.grad, theirs_x.grad)


def test_one_product_each_way(model: Attention, clear_model: Attention, recorder: Any) -> None:
    same(model, clear_model, torch.randn(2, 3, 6))
    assert [(e.layers, e.direction) for e in recorder.answered] == [(GROUP, "forward"), (GROUP, "backward")]
    assert [(e.bytes_up, e.bytes_down) for e in recorder.answered] == [
        (6 * 6 * 4, 6 * 17 * 4),
        (6 * 17 * 4, 6 * 6 * 4),
    ]


def test_apart_when_asked(clear_model: Attention, recorder: Any) -> None:
    model = ciphertune.outsource(copy.deepcopy(clear_model), "clear?share_inputs=0", plugins=recorder.plugins)
    same(model, clear_model, torch.randn(2, 3, 6))
    assert recorder.products("forward") == [("q_proj",), ("k_proj",), ("v_proj",)]
    assert sorted(recorder.products("backward")) == [("k_proj",), ("q_proj",), ("v_proj",)]
    assert sum(e.bytes_up for e in recorder.answered if e.direction == "forward") == 3 * 6 * 6 * 4


@pytest.mark.parametrize("inputs", [2, 3])
def test_different_inputs_dissolve_the_group(
    model: Attention, clear_model: Attention, recorder: Any, inputs: int
) -> None:
    given = [torch.randn(2, 6) for _ in range(inputs)]
    same(model, clear_model, *given)
    first = recorder.products("forward")
    assert first[0] == GROUP
    recorder.answered.clear()
    same(model, clear_model, *given)
    assert recorder.products("forward") == [("q_proj",), ("k_proj",), ("v_proj",)]


def test_equal_values_in_another_tensor_are_another_input(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(2, 6)
    same(model, clear_model, x, x.clone())


@pytest.mark.parametrize("change", ["tensor", "view", "detached"])
def test_an_input_changed_in_place_is_not_served_stale(model: Attention, clear_model: Attention, change: str) -> None:
    x = torch.randn(2, 6)
    model.q_proj(x)
    {"tensor": x, "view": x[0], "detached": x.detach()}[change].add_(1)
    torch.testing.assert_close(model.k_proj(x), clear_model.k_proj(x))
    torch.testing.assert_close(model.v_proj(x), clear_model.v_proj(x))


@pytest.mark.parametrize("write", ["add", "replace", "reshape", "dtype"])
def test_a_write_through_data_is_not_served_stale(model: Attention, clear_model: Attention, write: str) -> None:
    x = torch.randn(2, 6)
    model.q_proj(x)
    version = x._version
    if write == "add":
        x.data.add_(1)
    else:
        x.data = {"replace": torch.ones(2, 6), "reshape": torch.ones(3, 6), "dtype": torch.ones(2, 6).double()}[write]
    assert x._version == version
    for name in ("k_proj", "v_proj"):
        expected = getattr(clear_model, name)(x.float())
        torch.testing.assert_close(getattr(model, name)(x), expected, check_dtype=False)


def test_a_change_without_gradients_is_not_served_stale(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(2, 6, requires_grad=True)
    model.q_proj(x)
    with torch.no_grad():
        x.copy_(torch.ones(2, 6))
    torch.testing.assert_close(model.k_proj(x), clear_model.k_proj(x))
    (gradient,) = torch.autograd.grad(model.v_proj(x).square().sum(), x)
    (expected,) = torch.autograd.grad(clear_model.v_proj(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_inputs_without_rows(model: Attention, recorder: Any) -> None:
    x = torch.zeros(2, 0, 6, requires_grad=True)
    outputs = model(x)
    assert [output.shape for output in outputs] == [(2, 0, 8), (2, 0, 4), (2, 0, 5)]
    loss(outputs).backward()
    assert x.grad.shape == x.shape
    assert torch.equal(model.q_proj.bias.grad, torch.zeros(8))  # type: ignore[arg-type]
    assert recorder.asked == []


def test_first_without_and_then_with_gradients(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(2, 6, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    k = model.k_proj(x)
    (gradient,) = torch.autograd.grad(k.sum(), x)
    torch.testing.assert_close(gradient, clear_model.k_proj.weight.sum(0).expand(2, 6))
    with torch.no_grad():
        assert not model.v_proj(x).requires_grad
    same(model, clear_model, x)


def test_an_input_that_comes_to_need_gradients(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(2, 6)
    model.q_proj(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.k_proj(x).sum(), x)
    torch.testing.assert_close(gradient, clear_model.k_proj.weight.sum(0).expand(2, 6))


def test_evaluation_between_training_steps_keeps_the_group(
    model: Attention, clear_model: Attention, recorder: Any
) -> None:
    x = torch.randn(2, 6)
    for _ in range(2):
        same(model, clear_model, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), clear_model(x))
    assert set(recorder.products("forward")) == {GROUP}
    assert len(recorder.products("forward")) == 4


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_outputs_that_are_not_used(model: Attention, clear_model: Attention, recorder: Any, used: tuple[int]) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    outputs, expected = model(x), clear_model(x)
    gradients = [torch.autograd.grad(loss(ys[i] for i in used), x)[0] for ys in (outputs, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert recorder.products("backward") == [GROUP]


def test_gradients_of_each_output_on_its_own(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    for ours, theirs in zip(model(x), clear_model(x), strict=True):
        gradients = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, theirs)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_one_member_asked_alone_again_and_again(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(2, 6)
    for _ in range(3):
        torch.testing.assert_close(model.k_proj(x), clear_model.k_proj(x))
    other = torch.randn(4, 6)
    torch.testing.assert_close(model.k_proj(other), clear_model.k_proj(other))
    torch.testing.assert_close(model.q_proj(other), clear_model.q_proj(other))
    torch.testing.assert_close(model.q_proj(x), clear_model.q_proj(x))


def test_any_order(model: Attention, clear_model: Attention, recorder: Any) -> None:
    x = torch.randn(2, 6)
    for name in ("v_proj", "q_proj", "k_proj"):
        torch.testing.assert_close(getattr(model, name)(x), getattr(clear_model, name)(x))
    assert recorder.products("forward") == [GROUP]


def test_nothing_is_held_once_all_have_taken_theirs(model: Attention) -> None:
    x = torch.randn(2, 6, requires_grad=True)
    q = model.q_proj(x)
    k = model.k_proj(x)
    held = [weakref.ref(x)]
    v = model.v_proj(x)
    held += [weakref.ref(y) for y in (q, k, v)]
    assert not vars(model.q_proj.group._pending)
    del q, k, v, x
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


def test_a_group_does_not_keep_its_input_alive(model: Attention, clear_model: Attention) -> None:
    x = torch.randn(2, 6)
    model.q_proj(x)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    # Whatever takes the freed tensor's place in memory is another input.
    for _ in range(5):
        x = torch.randn(2, 6)
        torch.testing.assert_close(model.k_proj(x), clear_model.k_proj(x))
        del x


def test_copies_do_not_mix(model: Attention, clear_model: Attention) -> None:
    twin = copy.deepcopy(model)
    x, other = torch.randn(2, 6), torch.randn(2, 6)
    q = model.q_proj(x)
    torch.testing.assert_close(twin.k_proj(x), clear_model.k_proj(x))
    torch.testing.assert_close(twin.q_proj(other), clear_model.q_proj(other))
    torch.testing.assert_close(model.v_proj(x), clear_model.v_proj(x))
    torch.testing.assert_close(q, clear_model.q_proj(x))


def test_inference_mode(model: Attention, clear_model: Attention) -> None:
    outside = torch.randn(2, 6)
    with torch.inference_mode():
        inside = torch.randn(2, 6)
        for x in (inside, outside):
            torch.testing.assert_close(model(x), clear_model(x))
        model.q_proj(inside)
        inside.add_(1)  # leaves no trace on a tensor of inference mode
        torch.testing.assert_close(model.k_proj(inside), clear_model.k_proj(inside))
    with torch.no_grad():
        torch.testing.assert_close(model.k_proj(inside), clear_model.k_proj(inside))
    same(model, clear_model, outside)


def test_half_precision_inputs(model: Attention, clear_model: Attention, recorder: Any) -> None:
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    for output, expected in zip(model(x), clear_model(x.float()), strict=True):
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected.to(torch.bfloat16))
    assert recorder.products("forward") == [GROUP]


def test_layers_of_different_weights_formats_are_no_group(recorder: Any) -> None:
    model = Attention()
    model.k_proj = nn.Linear(4, 4)
    ciphertune.outsource(model, "clear", plugins=recorder.plugins)
    x = torch.randn(2, 6)
    model(x, torch.randn(2, 4))
    assert recorder.products("forward") == [("q_proj", "v_proj"), ("k_proj",)]


class Block(nn.Module):
    """Attention-like mixing with a trained scale, so that there is something to recompute."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(17, 6)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.cat([y.tanh() for y in self.attention(x * self.scale)], dim=-1)
        return x + self.out(mixed)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(recorder: Any, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    clear_blocks = nn.ModuleList([Block(), Block()])
    for block in clear_blocks:
        block.attention.requires_grad_(False)
        block.out.requires_grad_(False)
    blocks = ciphertune.outsource(copy.deepcopy(clear_blocks), "clear", plugins=recorder.plugins)
    data = torch.randn(2, 3, 6)

    def gradients(modules: nn.ModuleList, recompute: bool) -> list[Tensor]:
        x = data.clone().requires_grad_()
        y = x
        for block in modules:
            y = checkpoint(block, y, use_reentrant=use_reentrant) if recompute else block(y)
        leaves = [x, *(block.scale for block in modules)]
        modules.zero_grad()
        y.square().sum().backward()  # reentrant checkpoints work with backward() only
        return [leaf.grad.clone() for leaf in leaves]

    expected = gradients(clear_blocks, False)
    plain = gradients(blocks, False)
    recorder.answered.clear()
    recomputed = gradients(blocks, True)
    for ours, again, theirs in zip(plain, recomputed, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(again, theirs)
    # Forward products are evaluated again, whole groups at a time; backward ones are not.
    assert recorder.products("forward").count(tuple(f"0.attention.{name}" for name in GROUP)) == 2
    assert len(recorder.products("backward")) == 4


def test_groups_of_a_llama(tiny: Tiny, recorder: Any) -> None:
    model = ciphertune.outsource(tiny("llama"), "clear", plugins=recorder.plugins)
    model(torch.tensor([[1, 2, 3]]))
    one = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert [tuple(name.rpartition(".")[2] for name in layers) for layers in recorder.products("forward")] == one * 2


def test_groups_of_a_bert(tiny: Tiny, recorder: Any) -> None:
    model = ciphertune.outsource(tiny("bert"), "clear", plugins=recorder.plugins)
    model(torch.tensor([[1, 2, 3]]))
    assert tuple(f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "key", "value")) in recorder.products(
        "forward"
    )
    assert len(recorder.products("forward")) == 2 * 4 + 1
