"""An outsourced module in the place of one with a weight: what would compute with another weight is refused by name."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ciphertune
from ciphertune.errors import InputError, OutsourcedWeightError, SecurityError, UnsupportedLayerError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning"),
]
X = torch.linspace(-1, 1, 80).reshape(5, 16).sin()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))


def outsourced(to: str = "clear") -> Any:
    return ciphertune.outsource(net(), to, layers=["1", "3"])


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def unsafe(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Twice(), unsafe=True)


OTHER = torch.ones(16, 16)
WAYS: dict[str, Callable[[Any], Any]] = {
    "functional_call": lambda m: torch.func.functional_call(m, {"1.weight": OTHER}, (X,)),
    "load_state_dict": lambda m: m.load_state_dict({"1.weight": OTHER}, strict=False),
    "load_state_dict that assigns": lambda m: m.load_state_dict({"1.weight": OTHER}, strict=False, assign=True),
    "NaN": lambda m: m.load_state_dict({"1.weight": OTHER * torch.nan}, strict=False),
    "a parameter": lambda m: m[1]._parameters.__setitem__("weight", nn.Parameter(OTHER)) or m(X),
    "a registered parameter": lambda m: m[1].register_parameter("weight", nn.Parameter(OTHER)),
    "a buffer": lambda m: m[1]._buffers.__setitem__("weight", OTHER) or m(X),
    "an unsafe parametrization": lambda m: unsafe(m[1]) or m(X),  # type: ignore[func-returns-value]
    "a parametrization": lambda m: parametrize.register_parametrization(m[1], "weight", Twice()),
    "weight_norm": lambda m: nn.utils.weight_norm(m[1]),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m[1]),
    "pruning": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_another_weight_is_refused_by_name(way: str) -> None:
    with pytest.raises(OutsourcedWeightError, match="'1'"):
        WAYS[way](outsourced())


@pytest.mark.parametrize("to", ["clear", "mlwe", "clear?weight_bits=16"])
def test_a_state_dict_with_the_weights_at_the_workers_is_taken(to: str) -> None:
    model, stored = outsourced(to), net().state_dict()
    stored["0.bias"] += 1
    model.load_state_dict(stored)
    assert torch.equal(model[0].bias, stored["0.bias"])
    stored["1.weight"][3, 4] += 1
    with pytest.raises(OutsourcedWeightError, match="'1' was given another weight"):
        model.load_state_dict(stored)


def test_other_weights_of_other_modules() -> None:
    conv = ciphertune.outsource(nn.Sequential(nn.Conv2d(3, 4, 3)), "clear", convolutions=["0"])
    with pytest.raises(OutsourcedWeightError, match="'0' was given another"):
        torch.func.functional_call(conv, {"0.weight": torch.ones(4, 3, 3, 3)}, (torch.ones(1, 3, 4, 4),))
    gpt2 = small.model("GPT2LMHeadModel", n_embd=32, n_layer=1, n_head=2)
    stored = gpt2.state_dict()
    model = ciphertune.outsource(copy.deepcopy(gpt2), "clear", embeddings=True)
    model.load_state_dict(stored)
    with pytest.raises(OutsourcedWeightError, match=r"'transformer.h.0.mlp.c_fc' was given another"):
        model.load_state_dict(stored | {"transformer.h.0.mlp.c_fc.weight": torch.ones(32, 128)}, strict=False)
    with pytest.raises(OutsourcedWeightError, match="(wte|lm_head)' was given another"):
        torch.func.functional_call(model, {"transformer.wte.weight": torch.ones(96, 32)}, (small.ids(),))


def test_other_weights_of_experts() -> None:
    plain = small.model("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=2)
    model = ciphertune.outsource(copy.deepcopy(plain), "clear")
    model.load_state_dict(plain.state_dict())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    other = {name: torch.ones(2, 128, 32)}
    for way in (
        lambda: model.load_state_dict(other, strict=False),
        lambda: torch.func.functional_call(model, other, (), {"input_ids": small.ids()}),
    ):
        with pytest.raises(OutsourcedWeightError, match=f"'{name}' was given another"):
            way()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)])
def test_averages_over_steps(average: Any) -> None:
    found = []
    for model in (net(), outsourced()):
        model[1].weight.requires_grad_(False)
        model[3].weight.requires_grad_(False)
        kept = AveragedModel(model, multi_avg_fn=average)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
            kept.update_parameters(model)
        found.append(kept(X))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_copies_outlive_one_another() -> None:
    wanted, model = net()(X), outsourced()
    session = ciphertune.session_of(model)
    for restored, other in ((copy.deepcopy(model), model), (model, copy.deepcopy(model))):
        ciphertune.restore(restored)
        torch.testing.assert_close(restored(X), wanted)
        torch.testing.assert_close(other(X), wanted)
        assert not session.closed
    last = outsourced()
    ciphertune.session_of(last)
    gc.collect()
    output = last(X)
    ciphertune.restore(last)
    with pytest.raises(SecurityError, match="closed"):
        output.sum().backward()


def test_what_others_hung_on_a_layer_stays_when_it_is_restored() -> None:
    model = outsourced()
    model[1].mark, model[1].extra = 7, nn.Linear(2, 2)
    model[1].register_buffer("seen", torch.ones(2))
    model[1].register_forward_hook(lambda module, args, output: output * module.seen.sum())
    wanted = model(X)
    ciphertune.restore(model)
    torch.testing.assert_close(model(X), wanted)
    assert (model[1].mark, list(model[1].extra.state_dict())) == (7, ["weight", "bias"])
    assert set(vars(model[1])) - set(vars(nn.Linear(1, 1))) == {"mark"}


def test_a_forward_that_was_replaced_is_not_lost() -> None:
    model = outsourced()
    before = model[1].forward
    model[1].forward = lambda x: 2 * before(x)
    wanted = model(X)
    with pytest.raises(UnsupportedLayerError, match="1 cannot be restored: its forward was replaced"):
        ciphertune.restore(model)
    assert torch.equal(model(X), wanted)
    del model[1].forward
    ciphertune.restore(model)
    torch.testing.assert_close(model(X), net()(X))


@pytest.mark.parametrize("x", [torch.nested.nested_tensor([X[:2], X[:3]], layout=torch.jagged), X.to_sparse()])
def test_layouts_that_hold_no_rows(x: Tensor) -> None:
    with pytest.raises(InputError, match="1: (nested tensors|the input has the layout)"):
        outsourced()[1](x)
