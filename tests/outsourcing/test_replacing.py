"""What hangs on a layer goes over to the outsourced one and comes back with ``restore``, or is refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import ciphertune
from ciphertune import OutsourcedLinear
from ciphertune.errors import UnsupportedLayerError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

Tiny = Callable[[str], nn.Module]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


def registered(model: nn.Sequential, seen: list[str]) -> list[Any]:
    """One hook of every kind on both layers; hooks of the first change values."""
    first, last = model[0], model[2]
    note = seen.append
    return [
        first.register_forward_pre_hook(lambda m, args: (note("pre"), (args[0] * 2,))[1]),
        first.register_forward_hook(lambda m, args, y: (note("forward"), y + 1)[1]),
        last.register_forward_pre_hook(lambda m, args, kw: note("pre kwargs"), with_kwargs=True),
        last.register_forward_hook(lambda m, args, kw, y: note("kwargs"), with_kwargs=True),
        last.register_forward_hook(lambda m, args, y: note("always"), always_call=True),
        last.register_forward_hook(lambda m, args, y: note("prepended"), prepend=True),
        last.register_full_backward_pre_hook(lambda m, g: (note("backward pre"), (g[0] * 3,))[1]),
        last.register_full_backward_hook(lambda m, gi, go: (note("backward"), (gi[0] * 2,))[1]),
    ]


def run(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, 12).reshape(2, 6).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad  # type: ignore[return-value]


def test_hooks_of_every_kind_go_over_and_come_back() -> None:
    plain = network()
    wanted_seen: list[str] = []
    registered(plain, wanted_seen)
    wanted = run(plain)
    model = network()
    seen: list[str] = []
    handles = registered(model, seen)
    for change in (lambda m: ciphertune.outsource(m, "clear"), ciphertune.restore):
        change(model)
        seen.clear()
        results = run(model)
        assert seen == wanted_seen
        for result, expected in zip(results, wanted, strict=True):
            torch.testing.assert_close(result, expected)
    ciphertune.outsource(model, "clear")
    # Their handles still remove them, and new ones are kept too.
    for handle in handles:
        handle.remove()
    model[0].register_forward_hook(lambda *_: seen.append("new"))
    seen.clear()
    run(ciphertune.restore(model))
    assert seen == ["new"]


def test_a_hook_gets_the_layer_that_stands_there() -> None:
    model = network()
    layers: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: layers.append(module))
    ciphertune.outsource(model, "clear")
    run(model)
    assert layers == [model[0]]
    assert isinstance(model[0], OutsourcedLinear)


def test_attributes_that_others_put_on_a_layer() -> None:
    model = network()
    model[0].note = "mine"  # type: ignore[assignment]
    ciphertune.outsource(model, "clear")
    assert model[0].note == "mine"
    assert model[0].in_features == 6
    assert ciphertune.restore(model)[0].note == "mine"


def _forward(layer: nn.Module) -> None:
    layer.forward = functools.partial(type(layer).forward, layer)


def _accelerate(layer: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer, ModelHook())


def _extra(layer: nn.Module) -> None:
    layer.register_parameter("gate", nn.Parameter(torch.ones(4)))


OWN: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight_norm, old": (nn.utils.weight_norm, "its weight is computed from other tensors"),
    "weight_norm": (parametrizations.weight_norm, "its weight is computed from other tensors"),
    "spectral_norm, old": (nn.utils.spectral_norm, "its weight is computed from other tensors"),
    "spectral_norm": (parametrizations.spectral_norm, "its weight is computed from other tensors"),
    "orthogonal": (parametrizations.orthogonal, "its weight is computed from other tensors"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 2), "its weight is computed from other tensors"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 1), "beside weight and bias.*bias_mask"),
    "a parameter": (_extra, "beside weight and bias.*gate"),
    "a buffer": (lambda m: m.register_buffer("gate", torch.ones(4)), "beside weight and bias.*gate"),
    "a child": (lambda m: m.add_module("gate", nn.ReLU()), "beside weight and bias.*gate"),
    "forward": (_forward, "its forward was replaced on this instance"),
    "accelerate": (_accelerate, "accelerate"),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("conv1d", [False, True])
def test_what_an_outsourced_layer_would_lose_is_refused_by_name(kind: str, conv1d: bool) -> None:
    torch.manual_seed(0)
    model = network()
    if conv1d:
        model[2] = Conv1D(4, 6)
    change, reason = OWN[kind]
    change(model[2])
    x = torch.randn(3, 6)
    wanted = model(x).detach()
    trained = {name for name, p in model[2].named_parameters()}
    with pytest.raises(UnsupportedLayerError, match=f"^2 cannot be outsourced: .*{reason}"):
        ciphertune.outsource(model, "clear", layers=["0", "2"])
    ciphertune.outsource(model, "clear", layers="all")
    assert [layer.name for layer in ciphertune.outsourced_layers(model)] == ["0"]
    assert {name for name, p in model[2].named_parameters() if p.requires_grad} == trained
    torch.testing.assert_close(model.eval()(x), wanted)


def test_a_lazy_layer_is_outsourced_once_it_has_a_size() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(UnsupportedLayerError, match="lazy"):
        ciphertune.outsource(model, "clear", layers="0")
    model(torch.randn(2, 6))
    assert isinstance(ciphertune.outsource(model, "clear")[0], OutsourcedLinear)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Clamped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-100, 100))


class Dropping(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * scale


class Squeezing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).squeeze()


class Failing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError


class Turned(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


class Same(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Also(Conv1D):
    pass


def of_class(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(4, 6) if issubclass(kind, Conv1D) else kind(6, 4))


@pytest.mark.parametrize("kind", [Doubled, Clamped, Dropping, Scaled, Failing, Turned])
def test_derived_classes_that_compute_something_else_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"0 cannot be outsourced: {kind.__name__} .*behaviour of its own"):
        ciphertune.outsource(of_class(kind), "clear", layers="0")
    model = of_class(kind)
    state = torch.get_rng_state()
    assert ciphertune.validate(model).keys() == {"0"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Same, Also])
def test_derived_classes_that_compute_the_same_are_outsourced(kind: type[nn.Module]) -> None:
    reference = of_class(kind)
    model = ciphertune.outsource(of_class(kind), "clear")
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), reference(x))
    ciphertune.restore(model)
    assert type(model[0]) is kind
    torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "bert"])
@pytest.mark.parametrize("layers", [None, "all"])
def test_restore_is_exact(tiny: Tiny, name: str, layers: Any) -> None:
    original, model = tiny(name), tiny(name)
    for each in (original, model):
        each.get_input_embeddings().train()

    def facts(m: Any) -> dict[str, Any]:
        modules = dict(m.named_modules(remove_duplicate=False))
        state = m.state_dict(keep_vars=True)
        names = {id(value): key for key, value in state.items()}
        return {
            "classes": {key: type(module) for key, module in modules.items()},
            "sizes": {key: repr(module) for key, module in modules.items()},
            "training": {key: module.training for key, module in modules.items()},
            "trainable": {key: value.requires_grad for key, value in state.items()},
            "tied": {key: names[id(value)] for key, value in state.items()},
            "config": m.config.to_dict(),
            "tied keys": m.all_tied_weights_keys,
            "attributes": set(vars(m)),
        }  # fmt: skip

    ciphertune.restore(ciphertune.outsource(model, "clear", layers=layers))
    found, wanted = facts(model), facts(original)
    for key, value in wanted.items():
        assert found[key] == value, key
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_restored_weights_of_a_model_that_was_frozen_since_stay_frozen() -> None:
    from peft import LoraConfig, get_peft_model

    base = ciphertune.outsource(small.model("LlamaForCausalLM"), "clear")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    ciphertune.restore(model)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    frozen = small.model("LlamaForCausalLM").requires_grad_(False)
    ciphertune.restore(ciphertune.outsource(frozen, "clear"))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_restore_under_an_adapter_made_before() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small.model("LlamaForCausalLM"), LoraConfig(r=2, target_modules=["q_proj"]))
    facts = {name: (type(module), module.training) for name, module in model.named_modules()}
    ciphertune.restore(ciphertune.outsource(model, "clear", layers="all"))
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == facts


def test_layers_that_share_a_weight_share_it_again() -> None:
    model = network()
    model.append(nn.Linear(4, 6)).append(nn.Linear(4, 6))
    model[4].weight = model[3].weight
    shared = nn.ModuleList([model[0], model[3], model[4]])
    ciphertune.outsource(shared, "clear", layers="all")
    restored = ciphertune.restore(copy.deepcopy(shared))
    assert restored[1].weight is restored[2].weight
    assert restored[1].bias is not restored[2].bias
    assert restored[0].weight.requires_grad


def test_an_embedding_that_changed_since_is_the_head_again(tiny: Tiny) -> None:
    model = ciphertune.outsource(tiny("llama-tied"), "clear", layers="all")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    ciphertune.restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
