"""peft on outsourced models: adapters before and after, what trains as ever, and what is refused by name."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

import ciphertune
from ciphertune import OutsourcedLinear
from ciphertune.errors import OutsourcedWeightError

Tiny = Callable[[str], nn.Module]

pytestmark = [
    # peft notes, and corrects, the layout of adapters on GPT-2's Conv1D layers, outsourced or not.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # peft 0.21 asks transformers for a property by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers 5.23 has a newer name for this method; 5.0 does not.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]

TARGETS = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj"],
    "bert": ["query", "value", "dense"],
}
IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


def config(targets: Any, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=targets, **options)


def shake(model: nn.Module) -> nn.Module:
    """Give the adapters values: as peft makes them, half of the gradients vanish and hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def adapted(model: nn.Module, targets: Any, **options: Any) -> nn.Module:
    return shake(get_peft_model(model, config(targets, **options)))


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every trainable parameter."""
    model.zero_grad()
    logits = model(IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def same(model: nn.Module, reference: nn.Module) -> None:
    """Equal outputs and gradients, up to float32 rounding."""
    (logits, gradients), (expected, wanted) = trained(model), trained(reference)
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    assert gradients.keys() == wanted.keys()
    assert len(gradients) >= 6
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_train_as_on_the_model_itself(tiny: Tiny, name: str, order: str) -> None:
    reference = adapted(tiny(name), TARGETS[name])
    if order == "before":
        model = ciphertune.outsource(adapted(tiny(name), TARGETS[name]), "clear")
    else:
        model = adapted(ciphertune.outsource(tiny(name), "clear"), TARGETS[name])
    lora = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(lora) == len([m for m in reference.modules() if isinstance(m, LoraLayer)])
    assert all(isinstance(layer.base_layer, OutsourcedLinear) for layer in lora)
    assert all(type(m) is nn.Linear for layer in lora for m in (*layer.lora_A.values(), *layer.lora_B.values()))
    same(model, reference)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_all_linear_adapts_outsourced_layers(tiny: Tiny, name: str) -> None:
    reference = adapted(tiny(name), "all-linear")
    model = adapted(ciphertune.outsource(tiny(name), "clear"), "all-linear")
    bases = {id(m.base_layer) for m in model.modules() if isinstance(m, LoraLayer)}
    assert bases == {id(layer) for layer in ciphertune.outsourced_layers(model)}
    assert len(bases) == {"gpt2": 8, "llama": 14}[name]
    same(model, reference)


@pytest.mark.parametrize("layers", [None, "all", "*", nn.Linear, lambda name, module: True])
def test_an_adapters_own_layers_are_never_outsourced(tiny: Tiny, layers: Any) -> None:
    model = ciphertune.outsource(adapted(tiny("llama"), ["q_proj", "down_proj"]), "clear", layers=layers)
    names = [layer.name for layer in ciphertune.outsourced_layers(model)]
    assert len(names) == (14 if layers is None else 15)
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert not any("lora" in name or "base" in name for name in names)
    assert [p for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad] == []
    same(model, adapted(tiny("llama"), ["q_proj", "down_proj"]))


@pytest.mark.parametrize("layers", ["all", "*", nn.Linear])
def test_nor_are_those_of_a_frozen_adapter(tiny: Tiny, tmp_path: Path, layers: Any) -> None:
    adapted(tiny("llama"), ["q_proj", "down_proj"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    expected = model(IDS).logits
    ciphertune.outsource(model, "clear", layers=layers)
    assert ciphertune.share(model).layers == 15
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_have_the_names_of_the_bare_model(tiny: Tiny) -> None:
    before = ciphertune.outsource(adapted(tiny("gpt2"), "all-linear"), "clear", layers=["transformer.h.1.*", "c_fc"])
    after = ciphertune.outsource(tiny("gpt2"), "clear", layers=["transformer.h.1.*", "c_fc"])
    names = [[layer.name for layer in ciphertune.outsourced_layers(model)] for model in (before, after)]
    assert names[0] == names[1]
    assert len(names[0]) == 5


def test_wholly_trained_modules_stay(tiny: Tiny) -> None:
    # peft trains a copy of the classification head beside the original.
    model = adapted(tiny("bert"), ["query"], modules_to_save=["classifier"])
    ciphertune.outsource(model, "clear", layers="all")
    names = [layer.name for layer in ciphertune.outsourced_layers(model)]
    assert len(names) == 13
    assert not any("classifier" in name for name in names)
    same(model, adapted(tiny("bert"), ["query"], modules_to_save=["classifier"]))


def test_products_sent_for_adapters(tiny: Tiny, recorder: Any) -> None:
    model = adapted(ciphertune.outsource(tiny("llama"), "clear", plugins=recorder.plugins), ["v_proj"])
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    trained(model)
    assert len(recorder.products("forward")) == 8
    # Gradients go back to the first trained adapter and no further: not into the layers before it, and not into
    # the projections that read the embeddings' side.
    backward = [layers[0].removeprefix("model.layers.") for layers in recorder.products("backward")]
    assert backward == ["1.mlp.down_proj", "1.mlp.gate_proj", "1.self_attn.o_proj"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(tiny: Tiny, recorder: Any, use_reentrant: bool) -> None:
    reference = adapted(tiny("llama"), TARGETS["llama"])
    model = adapted(ciphertune.outsource(tiny("llama"), "clear", plugins=recorder.plugins), TARGETS["llama"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for module in (model, reference):
        module.train()
    same(model, reference)
    # Every group once, and once more when recomputed; the other kind stops where no more saved tensor is needed,
    # which is before the last layer of each block.
    assert len(recorder.products("forward")) == (16 if use_reentrant else 14)
    assert len(recorder.products("backward")) == 8


def test_adapters_off(tiny: Tiny) -> None:
    original = tiny("gpt2")
    model = adapted(ciphertune.outsource(tiny("gpt2"), "clear"), "all-linear")
    on = model(IDS).logits
    with model.disable_adapter():
        off = model(IDS).logits
    torch.testing.assert_close(off, original(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (on - off).norm() > 0.01 * off.norm()
    torch.testing.assert_close(model(IDS).logits, on)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_saved_adapter_loads_on_the_original_model(tiny: Tiny, tmp_path: Path, name: str, order: str) -> None:
    if order == "before":
        model = ciphertune.outsource(adapted(tiny(name), TARGETS[name]), "clear")
    else:
        model = adapted(ciphertune.outsource(tiny(name), "clear"), TARGETS[name])
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert ciphertune.share(loaded).layers == 0
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(ciphertune.outsource(tiny(name), "clear"), tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_full_model_is_not_saved(tiny: Tiny, tmp_path: Path, order: str) -> None:
    if order == "before":
        model = ciphertune.outsource(adapted(tiny("llama"), ["q_proj"]), "clear")
    else:
        model = adapted(ciphertune.outsource(tiny("llama"), "clear"), ["q_proj"])
    with pytest.raises(OutsourcedWeightError, match="cannot be saved whole"):
        model.get_base_model().save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    ciphertune.restore(model)
    model.get_base_model().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_merging_is_refused_and_unloading_works(tiny: Tiny) -> None:
    original = tiny("llama")(IDS).logits
    model = adapted(ciphertune.outsource(tiny("llama"), "clear"), ["q_proj"])
    before = model(IDS).logits
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        copy.deepcopy(model).merge_and_unload,
    ):
        with pytest.raises(OutsourcedWeightError, match=r"layers\.0\.self_attn\.q_proj' is at the workers"):
            merge()
    torch.testing.assert_close(model(IDS).logits, before)
    bare = model.unload()
    assert not any(isinstance(module, LoraLayer) for module in bare.modules())
    assert ciphertune.share(bare).layers == 14
    torch.testing.assert_close(bare(IDS).logits, original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_needs_the_weight_is_refused_by_name(tiny: Tiny, name: str, options: Any) -> None:
    model = ciphertune.outsource(tiny(name), "clear")
    first = {"gpt2": "transformer.h.0.mlp.c_fc", "llama": "model.layers.0.self_attn.q_proj"}[name]
    with pytest.raises(OutsourcedWeightError, match=f"'{first}'.*DoRA"):
        get_peft_model(model, config(["q_proj", "c_fc"], **options))


def test_dora_made_before_is_refused_when_it_is_used(tiny: Tiny) -> None:
    model = ciphertune.outsource(adapted(tiny("llama"), ["q_proj"], use_dora=True), "clear")
    with pytest.raises(OutsourcedWeightError, match=r"'model.layers.0.self_attn.q_proj'"):
        model(IDS)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_do_not_need_the_weight(tiny: Tiny, init: Any) -> None:
    models = []
    for outsourced in (True, False):
        base = ciphertune.outsource(tiny("llama"), "clear") if outsourced else tiny("llama")
        torch.manual_seed(11)
        models.append(get_peft_model(base, config(["q_proj", "v_proj"], init_lora_weights=init)).eval())
    adapters = [{n: p for n, p in model.named_parameters() if "lora_" in n} for model in models]
    for name, parameter in adapters[0].items():
        assert torch.equal(parameter, adapters[1][name]), name
    torch.testing.assert_close(models[0](IDS).logits, models[1](IDS).logits, rtol=1e-4, atol=1e-4)


def _initialised(model: Any, kind: str) -> Any:
    """A model with adapters that data, or the weight, decides."""
    if kind == "loftq":
        own: dict[str, Any] = {"loftq_config": peft.LoftQConfig(loftq_bits=4)}
    elif kind == "corda":
        own = {"corda_config": CordaConfig(corda_method="kpm")}
    else:
        own = {"eva_config": peft.EvaConfig(rho=1.0)} if kind == "eva" else {}
    made = config(["q_proj", "v_proj"], init_lora_weights=kind, **own)
    if kind == "corda":
        # Which peft imports and does not ask for.
        pytest.importorskip("attr")
        from peft.tuners.lora.corda import preprocess_corda

        with torch.no_grad():
            preprocess_corda(model, made, run_model=lambda: [model(input_ids=row[None]) for row in IDS])
    adapted_model = get_peft_model(model, made)
    if kind == "eva":
        peft.initialize_lora_eva_weights(adapted_model, [{"input_ids": IDS}] * 3)
    return adapted_model


@pytest.mark.filterwarnings("ignore:lora with eva:UserWarning")
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_2", "olora", "corda", "eva"])
def test_initialisations_by_the_weight_or_by_data_come_before(tiny: Tiny, kind: str) -> None:
    model = _initialised(tiny("llama"), kind).eval()
    wanted = model(IDS).logits.detach()
    ciphertune.outsource(model, "clear")
    found = model(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_2", "olora", "corda"])
def test_initialisations_by_the_weight_are_refused_by_name_afterwards(tiny: Tiny, kind: str) -> None:
    model = ciphertune.outsource(tiny("llama"), "clear")
    said = r"q_proj' is at the workers.*(PiSSA|CorDA).*before the model is outsourced"
    with pytest.raises(OutsourcedWeightError, match=said):
        _initialised(model, kind)


@pytest.mark.filterwarnings("ignore:lora with eva:UserWarning")
def test_an_initialisation_by_what_a_layer_gets_may_come_afterwards(tiny: Tiny) -> None:
    wanted = _initialised(tiny("llama"), "eva").eval()
    found = _initialised(ciphertune.outsource(tiny("llama"), "clear"), "eva").eval()
    torch.testing.assert_close(found(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)
    adapters = [{n: p for n, p in model.named_parameters() if "lora_A" in n} for model in (wanted, found)]
    for name, parameter in adapters[0].items():
        torch.testing.assert_close(parameter.abs(), adapters[1][name].abs(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", ["before", "after"])
def test_loftq_is_refused_in_a_sentence_where_its_quantizer_is_missing(tiny: Tiny, order: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("its quantizer is installed")
    model: Any = tiny("llama")
    with pytest.raises(ValueError, match="bitsandbytes is not available"):
        _initialised(model if order == "before" else ciphertune.outsource(model, "clear"), "loftq")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_restored_models_merge_as_the_original_does(tiny: Tiny, name: str, order: str) -> None:
    targets = {"gpt2": "all-linear", "llama": ["q_proj", "o_proj", "up_proj"]}[name]
    expected = adapted(tiny(name), targets)(IDS).logits
    if order == "before":
        model = ciphertune.outsource(adapted(tiny(name), targets), "clear")
    else:
        model = adapted(ciphertune.outsource(tiny(name), "clear"), targets)
    ciphertune.restore(model)
    assert ciphertune.share(model).layers == 0
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_several_adapters(tiny: Tiny) -> None:
    model = adapted(ciphertune.outsource(tiny("llama"), "clear"), ["q_proj"])
    model.add_adapter("second", config(["up_proj"]))
    shake(model)
    first = model(IDS).logits
    model.set_adapter("second")
    second = model(IDS).logits
    assert (second - first).norm() > 1e-3 * first.norm()
    model.set_adapter("default")
    model.delete_adapter("second")
    torch.testing.assert_close(model(IDS).logits, first, rtol=1e-4, atol=1e-4)


def test_bfloat16_adapters(tiny: Tiny) -> None:
    reference = adapted(tiny("llama").to(torch.bfloat16), ["q_proj", "up_proj"])
    model = adapted(ciphertune.outsource(tiny("llama").to(torch.bfloat16), "clear"), ["q_proj", "up_proj"])
    dtypes = [{n: p.dtype for n, p in m.named_parameters() if "lora_" in n} for m in (model, reference)]
    assert dtypes[0] == dtypes[1]
    (logits, gradients), (expected, wanted) = trained(model), trained(reference)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.05 * expected.norm()
    for name, gradient in wanted.items():
        assert gradients[name].dtype == gradient.dtype
        assert (gradients[name] - gradient).norm() < 0.15 * gradient.norm(), name


def test_moving_adapters_follows_the_absent_weight(tiny: Tiny) -> None:
    model = ciphertune.outsource(tiny("llama"), "clear").to(torch.bfloat16)
    model = get_peft_model(model, config(["q_proj"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_adapters_that_layers_share(tiny: Tiny) -> None:
    """Two layers train the same matrices, and gradients of both add up."""
    found = []
    for outsourced in (False, True):
        model: Any = adapted(tiny("llama"), ["q_proj", "v_proj"])
        first, second = (model.base_model.model.model.layers[index].self_attn.q_proj for index in (0, 1))
        second.lora_A, second.lora_B = first.lora_A, first.lora_B
        found.append(trained(ciphertune.outsource(model, "clear") if outsourced else model))
    (wanted, gradients), (logits, own) = found
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_after_outsourcing(tiny: Tiny, dtype: torch.dtype) -> None:
    plain = adapted(tiny("llama"), ["q_proj", "v_proj"]).to(dtype)
    model = ciphertune.outsource(adapted(tiny("llama"), ["q_proj", "v_proj"]), "clear").to(dtype)
    (wanted, gradients), (logits, own) = trained(plain), trained(model)
    assert logits.dtype == dtype
    within = 1e-4 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    assert float((logits.double() - wanted.double()).norm()) <= within * float(wanted.double().norm())
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((own[name].double() - gradient.double()).norm()) <= 4 * within * float(gradient.double().norm()), (
            name
        )
