"""The outsourced linear module and the groups its layers are evaluated in."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import Attention, gradients, recorded, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ciphertune
from ciphertune.errors import InputError, OutsourcedWeightError
from ciphertune.linear import OutsourcedLinear


def outsourced(to: str = "clear", bias: bool = True) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias)
    return layer, ciphertune.outsource(nn.Sequential(copy.deepcopy(layer)), to)[0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=4), st.booleans())
def test_any_leading_dimensions(leading: list[int], bias: bool) -> None:
    layer, module = outsourced(bias=bias)
    x = torch.randn(*leading, 6)
    assert torch.equal(module(x), layer(x))


@pytest.mark.parametrize("to", ["clear", "mlwe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_come_back_as_they_went_in(to: str, dtype: torch.dtype) -> None:
    layer, module = outsourced(to)
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    y = module(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert relative(y.detach(), layer(x.detach().float())) < 2e-2
    assert relative(x.grad, layer.weight.detach().sum(0).expand(3, 6)) < 3e-2


def test_autocast_decides_the_output_as_for_a_linear_layer() -> None:
    layer, module = outsourced()
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = layer(x), module(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert relative(got.detach(), want.detach()) < 1e-2
    got.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_strided_inputs() -> None:
    layer, module = outsourced()
    x = torch.randn(6, 8, 3).permute(2, 1, 0)[:, ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(module(x), layer(x))
    expanded = torch.randn(1, 6).expand(7, 6)
    torch.testing.assert_close(module(expanded), layer(expanded))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 5), r"0: expected an input of shape \(…, 6\), got \(3, 5\)"),
        (torch.tensor(1.0), "0: expected an input of shape"),
        (torch.ones(3, 6, dtype=torch.long), "floating-point"),
        (torch.empty(0, 6), "no tokens"),
        (torch.empty(2, 0, 6), "no tokens"),
        (torch.full((3, 6), torch.nan), "NaN or infinite"),
        (torch.tensor([[torch.inf, -torch.inf, 0, 0, 0, 0]]), "0 .forward.: 2 of 6 values"),
    ],
)
@pytest.mark.parametrize("to", ["clear", "simulation", "mlwe"])
def test_bad_inputs_name_the_layer_and_nothing_is_sent(to: str, x: Tensor, message: str) -> None:
    manager, recorder = recorded()
    model = ciphertune.outsource(nn.Sequential(nn.Linear(6, 5)), to, plugins=manager)
    with pytest.raises(InputError, match=message):
        model(x)
    assert recorder.before == []
    assert ciphertune.session_of(model).traffic.requests == 0
    model(torch.full((2, 6), 3e38))  # large, but finite: its sum is not


def test_bad_gradients_name_the_layer() -> None:
    _, module = outsourced("mlwe")
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(InputError, match=r"0 \(backward\): 1 of 10 values"):
        module(x).backward(torch.tensor([[1.0, torch.nan, 0, 0, 0], [0, 0, 0, 0, 0]]))


def test_the_absent_weight_answers_for_its_kind_and_refuses_its_values() -> None:
    _, module = outsourced()
    weight = module.weight
    assert (weight.device.type, weight.dtype, weight.numel(), weight.requires_grad) == ("cpu", torch.float32, 0, False)
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert "weight" not in module.state_dict()
    for use in (
        lambda: weight + 1,
        lambda: weight.data,
        lambda: weight @ torch.randn(6, 2),
        lambda: torch.nn.functional.linear(torch.randn(1, 6), weight),
        lambda: weight.norm(),
        lambda: weight.normal_(),
        lambda: module.reset_parameters(),
    ):
        with pytest.raises(OutsourcedWeightError, match="'0'"):
            use()
    copy.deepcopy(module)
    assert "to='clear'" in repr(module)


class Crossed(nn.Module):
    """Names of siblings, inputs of cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], -1)


def test_siblings_are_one_product_each_way() -> None:
    manager, recorder = recorded()
    model = Attention()
    x = torch.randn(2, 3, 24)
    want_y, want_g = gradients(model, x)
    y, g = gradients(ciphertune.outsource(model, "clear", plugins=manager), x)
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(g, want_g)
    siblings = ("q_proj", "k_proj", "v_proj")
    assert recorder.layers("forward") == [siblings, ("o_proj",)]
    assert recorder.layers("backward") == [("o_proj",), siblings]


def test_sharing_can_be_switched_off_and_saves_bytes() -> None:
    x, bytes_up, bytes_down = torch.randn(300, 24), [], []
    for share in (0, 1):
        manager, recorder = recorded()
        gradients(ciphertune.outsource(Attention(), f"mlwe?share_inputs={share}", plugins=manager), x)
        assert recorder.count("forward") == recorder.count("backward") == (2 if share else 4)
        bytes_up.append(sum(e.bytes_up for e in recorder.exchanges))
        bytes_down.append(sum(e.bytes_down for e in recorder.exchanges))
    assert bytes_up[0] - bytes_up[1] == 2 * (24 * 4 * 300) + 4 * 32
    assert bytes_down[0] - bytes_down[1] == 2 * (24 * 3 * (1280 + 300))


def test_layers_that_turn_out_not_to_be_siblings() -> None:
    manager, recorder = recorded()
    model = Crossed()
    want = copy.deepcopy(model)
    ciphertune.outsource(model, "clear", plugins=manager)
    for _ in range(3):
        x, other = torch.randn(5, 8), torch.randn(7, 8)[:5]
        torch.testing.assert_close(model(x, other), want(x, other))
    # Only the first guess was wrong; after it each layer is asked alone.
    assert recorder.layers("forward")[0] == ("q_proj", "k_proj", "v_proj")
    assert recorder.layers("forward")[1:] == [("k_proj",), ("v_proj",)] + [("q_proj",), ("k_proj",), ("v_proj",)] * 2


def test_an_input_changed_in_place_is_not_answered_from_before() -> None:
    model = Attention()
    want = copy.deepcopy(model)
    ciphertune.outsource(model, "clear")
    x = torch.randn(4, 24)
    torch.testing.assert_close(model.q_proj(x), want.q_proj(x))
    x.mul_(2)
    torch.testing.assert_close(model.k_proj(x), want.k_proj(x))


def test_answers_made_without_gradients_are_not_used_with_them() -> None:
    model = ciphertune.outsource(Attention(), "clear")
    x = torch.randn(4, 24, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad


def test_siblings_nobody_used_count_as_zero() -> None:
    model = Attention()
    want = copy.deepcopy(model)
    ciphertune.outsource(model, "clear")
    grads = []
    for net in (model, want):
        x = torch.ones(4, 24, requires_grad=True)
        net.q_proj(x), net.v_proj(x)
        (net.k_proj(x) ** 2).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_outputs_are_not_kept_once_everybody_has_theirs() -> None:
    model = ciphertune.outsource(Attention(), "clear")
    x = torch.randn(4, 24)
    outputs = [model.q_proj(x), model.k_proj(x), model.v_proj(x)]
    references = [weakref.ref(output) for output in outputs]
    del outputs
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = Attention()
    want = copy.deepcopy(model)
    ciphertune.outsource(model, "clear")
    x = torch.randn(4, 24)
    _, want_g = gradients(want, x)
    _, g = gradients(
        lambda value: checkpoint(model, value, use_reentrant=reentrant),  # type: ignore[arg-type]
        x,
    )
    torch.testing.assert_close(g, want_g)


def test_outputs_may_be_changed_in_place() -> None:
    model = ciphertune.outsource(Attention(), "clear")
    x = torch.randn(4, 24, requires_grad=True)
    model.k_proj(x).mul_(2).sum().backward()
    assert x.grad is not None
    assert isinstance(model.k_proj, OutsourcedLinear)
