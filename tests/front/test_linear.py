"""The module that stands where a linear layer stood, against that layer."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import ciphertune
from ciphertune import OutsourcedLinear
from ciphertune.errors import OutsourcedWeightError


def pair(to: str = "clear", bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Module]:
    """A linear layer, and a model of the same one outsourced."""
    torch.manual_seed(3)
    reference = nn.Linear(6, 5, bias=bias).to(dtype)
    model = nn.Sequential(copy.deepcopy(reference))
    return reference, ciphertune.outsource(model, to)


# Opening a session per example would only slow hypothesis down.
cached_pair = functools.cache(pair)


@given(st.lists(st.integers(1, 4), max_size=4), st.booleans(), st.integers(0, 99))
def test_any_leading_dimensions(leading: list[int], bias: bool, seed: int) -> None:
    reference, model = cached_pair(bias=bias)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, 6, generator=generator)
    g = torch.randn(*leading, 5, generator=generator)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    y, expected = model(inputs[0]), reference(inputs[1])
    torch.testing.assert_close(y, expected)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("weight_bits", [8, 16])
def test_against_weights_quantized_by_hand(weight_bits: int) -> None:
    reference, model = pair(f"clear?weight_bits={weight_bits}")
    top = {8: 127, 16: 32639}[weight_bits]
    weight = reference.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / top
    rounded = (weight / scale).round() * scale
    assert not torch.equal(rounded, weight)
    x, g = torch.randn(7, 6, requires_grad=True), torch.randn(7, 5)
    y = model(x)
    torch.testing.assert_close(y, nn.functional.linear(x, rounded, reference.bias))
    (gradient,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gradient, g @ rounded)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("module_dtype", DTYPES)
@pytest.mark.parametrize("input_dtype", DTYPES)
def test_the_result_and_the_gradient_have_the_inputs_dtype(module_dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    reference, model = pair(dtype=module_dtype)
    assert model[0].weight.dtype == module_dtype
    x = torch.randn(3, 6).to(input_dtype).requires_grad_()
    g = torch.randn(3, 5).to(input_dtype)
    y = model(x)
    (gradient,) = torch.autograd.grad(y, x, g)
    assert (y.dtype, gradient.dtype) == (input_dtype, input_dtype)
    assert reference.bias is not None
    # The product is a float32 one, rounded once.
    expected = nn.functional.linear(x.float(), reference.weight.float(), reference.bias.float())
    torch.testing.assert_close(y, expected.to(input_dtype), check_dtype=False)
    torch.testing.assert_close(gradient, (g.float() @ reference.weight.float()).to(input_dtype))


@pytest.mark.parametrize(("to", "tolerance"), [("clear", 1e-6), ("clear?weight_bits=16", 1e-4)])
def test_models_in_float64_have_products_in_float32(to: str, tolerance: float) -> None:
    reference, model = pair(to, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    results = [(y := module(x), *torch.autograd.grad(y.square().sum(), x)) for module in (model, reference)]
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == torch.float64
        assert 0 < (ours - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("bad", [1, 3])
def test_overflown_gradients_of_float16_are_nan_row_by_row(recorder: Any, bad: int) -> None:
    torch.manual_seed(0)
    model = ciphertune.outsource(nn.Sequential(nn.Linear(6, 5)), "clear", plugins=recorder.plugins)
    x = torch.randn(3, 6, dtype=torch.float16, requires_grad=True)
    gradient = torch.ones(3, 5, dtype=torch.float16)
    model(x).backward(gradient)
    whole = x.grad.clone()
    x.grad = None
    recorder.answered.clear()
    gradient[:bad, 2] = torch.inf
    model(x).backward(gradient)
    assert bool(x.grad[:bad].isnan().all())
    torch.testing.assert_close(x.grad[bad:], whole[bad:])
    # What is sent must not tell how many rows overflowed.
    assert [exchange.tokens for exchange in recorder.answered if exchange.direction == "backward"] == [3]


@pytest.mark.parametrize("enclosed_backward", [False, True])
def test_autocast(enclosed_backward: bool) -> None:
    reference, model = pair()
    results = []
    x = torch.randn(4, 6)
    for module in (reference, model):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(leaf)
            if enclosed_backward:
                y.float().square().sum().backward()
        if not enclosed_backward:
            y.float().square().sum().backward()
        results.append((y, leaf.grad))
    assert results[1][0].dtype == results[0][0].dtype == torch.bfloat16
    assert results[1][1].dtype == torch.float32
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.05, atol=0.05)


def test_autocast_does_not_reach_the_product() -> None:
    reference, model = pair()
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y, reference(x).to(torch.bfloat16), rtol=0, atol=0)


def test_no_backward_product_where_the_input_needs_no_gradient(recorder: Any) -> None:
    torch.manual_seed(0)
    model = ciphertune.outsource(nn.Sequential(nn.Linear(6, 5)), "clear", plugins=recorder.plugins)
    x, g = torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    y = model(x)
    y.backward(g)
    torch.testing.assert_close(model[0].bias.grad, g.sum((0, 1)))
    assert recorder.products("backward") == []
    model[0].bias.requires_grad_(False)
    assert not model(x).requires_grad
    model(x.requires_grad_()).backward(g)
    assert recorder.products("backward") == [("0",)]


def test_only_layers_after_the_first_trained_parameter_send_gradients(recorder: Any) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).requires_grad_(False)
    model[2].requires_grad_(True)
    ciphertune.outsource(model, "clear", plugins=recorder.plugins)
    model(torch.randn(2, 4)).sum().backward()
    assert recorder.products("forward") == [("0",), ("1",), ("3",), ("4",)]
    assert recorder.products("backward") == [("4",), ("3",)]


def test_bias_and_module_attributes() -> None:
    reference, model = pair()
    layer = model[0]
    assert isinstance(layer, OutsourcedLinear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.name) == (6, 5, "0")
    assert isinstance(layer.bias, nn.Parameter)
    assert torch.equal(layer.bias, reference.bias)
    assert layer.bias.requires_grad
    assert pair(bias=False)[1][0].bias is None
    assert repr(layer) == "OutsourcedLinear(in_features=6, out_features=5, to='clear')"


def test_the_bias_is_the_same_parameter() -> None:
    # An optimizer made before goes on with it.
    model = nn.Sequential(nn.Linear(3, 3))
    bias = model[0].bias
    assert ciphertune.outsource(model, "clear")[0].bias is bias


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].eval()
    ciphertune.outsource(model, "clear")
    assert [layer.training for layer in model] == [False, True]


def test_inputs_of_any_strides() -> None:
    reference, model = pair()
    base = torch.randn(6, 4, 3)
    for x in (
        base.permute(1, 2, 0),
        base.transpose(0, 2),
        torch.randn(1, 1, 6).expand(4, 3, 6),
        torch.randn(4, 12)[:, ::2],
    ):
        assert not x.is_contiguous()
        leaves = [x.detach().requires_grad_(), x.detach().clone().requires_grad_()]
        y, expected = model(leaves[0]), reference(leaves[1])
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_the_input_and_the_output_may_change_in_place() -> None:
    reference, model = pair()
    x = torch.randn(2, 6, requires_grad=True)
    inner = x * 1
    y = model(inner)
    inner.mul_(0)
    y.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * reference.weight.sum(0).expand(2, 6))


def test_gradients_accumulate_and_graphs_can_be_kept() -> None:
    reference, model = pair()
    x = torch.randn(2, 6, requires_grad=True)
    y = model(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(x.grad, 2 * reference.weight.sum(0).expand(2, 6))


def test_numerical_gradient() -> None:
    _, model = pair("clear?weight_bits=8")
    x = torch.randn(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    step = 0.01 * torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = model(x + step).double().square().sum() - model(x - step).double().square().sum()
    assert (gradient * step).sum().item() == pytest.approx(difference.item() / 2, rel=1e-3)


def test_state_dict_round_trip() -> None:
    _, model = pair()
    state = model.state_dict()
    assert list(state) == ["0.bias"]
    _, other = pair()
    with torch.no_grad():
        other[0].bias.zero_()
    other.load_state_dict(state)
    assert torch.equal(other[0].bias, model[0].bias)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["0.bias"], model[0].bias)
    x = torch.randn(2, 6)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(dtype: torch.dtype) -> None:
    reference, model = pair()
    model.to(dtype)
    assert (model[0].weight.dtype, model[0].bias.dtype) == (dtype, dtype)
    x = torch.randn(3, 6).to(dtype)
    expected = nn.functional.linear(x.float(), reference.weight, model[0].bias.float())
    torch.testing.assert_close(model(x), expected.to(dtype))
    model.to(torch.float32)
    assert model[0].weight.dtype == torch.float32
    with pytest.raises(OutsourcedWeightError, match="'0'"):
        model[0].weight.sum()


def test_the_weight_answers_questions_and_nothing_else() -> None:
    layer = pair()[1][0]
    weight = layer.weight
    assert (weight.device, weight.dtype, weight.requires_grad) == (torch.device("cpu"), torch.float32, False)
    assert weight.numel() == 0
    for held in (weight, weight.to(torch.float64), weight.detach()):
        assert (held.shape, held.size(), held.ndim, held.dim(), len(held)) == ((5, 6), (5, 6), 2, 2, 5)
        assert (held.size(0), held.size(dim=-1)) == (5, 6)
    assert repr(weight) == "AbsentTensor([])"
    uses: list[Any] = [
        lambda: weight + 1,
        lambda: weight @ torch.randn(6, 5),
        lambda: nn.functional.linear(torch.randn(2, 6), weight),
        lambda: torch.linalg.svd(weight),
        lambda: weight.data,
        lambda: weight.T,
        lambda: weight.t(),
        lambda: weight.copy_(torch.zeros(0)),
        lambda: nn.init.zeros_(weight),
        lambda: weight.numpy(),
        lambda: weight.tolist(),
        lambda: weight[0],
        lambda: weight.to(torch.float64).mul(2),
        lambda: weight.detach().norm(),
        lambda: setattr(weight, "requires_grad", True),
        lambda: weight.requires_grad_(),
        lambda: weight.requires_grad_(requires_grad=True),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(5, 6))),
        layer.reset_parameters,
    ]
    for use in uses:
        with pytest.raises(OutsourcedWeightError, match="weight of '0' is at the workers"):
            use()


def test_a_model_that_reads_the_weight_is_told_which_layer() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.projection.weight.t()

    model = ciphertune.outsource(Reader(), "clear")
    with pytest.raises(OutsourcedWeightError, match=r"'projection'.*leave the layer out with layers="):
        model(torch.randn(1, 4))


def test_a_weight_that_is_not_trained_may_be_told_so() -> None:
    weight: Any = ciphertune.outsource(nn.Sequential(nn.Linear(4, 3)), "clear")[0].weight
    weight.requires_grad = False
    assert weight.requires_grad_(False) is weight
    with pytest.raises(OutsourcedWeightError, match="'0' is at the workers"):
        torch.cat([weight, weight])


def test_torchs_encoder_layer_does_not_take_its_fast_path() -> None:
    # In evaluation it hands its weights to one fused kernel, unless one of them is not a plain tensor.
    torch.manual_seed(0)
    reference = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.warns(UserWarning, match="20% of the weights .* self_attn.out_proj: nn.MultiheadAttention computes"):
        model = ciphertune.outsource(copy.deepcopy(reference), "clear")
    assert [layer.name for layer in ciphertune.outsourced_layers(model)] == ["linear1", "linear2"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))


def test_data_parallel_is_refused() -> None:
    _, model = pair()
    with pytest.raises(OutsourcedWeightError, match=r"'0' cannot be replicated by DataParallel"):
        model[0]._replicate_for_data_parallel()


@pytest.mark.parametrize("dump", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch"])
def test_pickling_is_refused(dump: Any) -> None:
    _, model = pair()
    with pytest.raises(OutsourcedWeightError):
        dump(model)


def test_copies_share_the_session_and_not_the_bias() -> None:
    reference, model = pair()
    twin = copy.deepcopy(model)
    assert ciphertune.session_of(twin) is ciphertune.session_of(model)
    with torch.no_grad():
        twin[0].bias.zero_()
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(twin(x), reference(x) - reference.bias)


def test_inference_mode() -> None:
    reference, model = pair()
    with torch.inference_mode():
        x = torch.randn(2, 6)
        torch.testing.assert_close(model(x), reference(x))


def test_extra_arguments_are_ignored_as_a_conv1d_or_peft_may_pass_them() -> None:
    reference, model = pair()
    x = torch.randn(2, 6)
    torch.testing.assert_close(model[0](x, None, adapter_names=None), reference(x))
