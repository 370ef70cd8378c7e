"""peft and transformers models, outsourced before and after adapters are added."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recorded, relative
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import ciphertune
from ciphertune.errors import OutsourcedWeightError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

IDS = torch.arange(24).view(2, 12) % 19


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    return BertModel(config).eval()


def output(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS)[0]
    return result


def objective(y: torch.Tensor) -> torch.Tensor:
    """A functional whose gradient does not vanish behind a layer norm."""
    return (y * torch.linspace(-1, 1, y.numel()).view_as(y) ** 3).sum()


@pytest.mark.parametrize(
    ("make", "layers", "products"), [(llama, 14, 8), (gpt2, 8, 8), (bert, 13, 9)], ids=["llama", "gpt2", "bert"]
)
@pytest.mark.parametrize(("to", "tolerance"), [("clear", 1e-5), ("mlwe", 3e-2)])
def test_transformers_models_give_what_they_gave(
    make: Any, layers: int, products: int, to: str, tolerance: float
) -> None:
    model = make()
    embeddings = model.get_input_embeddings()
    want_model = copy.deepcopy(model)
    want = output(want_model)
    objective(want).backward()
    manager, recorder = recorded()
    ciphertune.outsource(model, to, plugins=manager)
    assert len(ciphertune.outsourced_layers(model)) == layers
    got = output(model)
    objective(got).backward()
    assert relative(got.detach(), want.detach()) < tolerance
    assert relative(embeddings.weight.grad, want_model.get_input_embeddings().weight.grad) < 2 * tolerance
    # bert's pooler runs forward, but its output is not what is differentiated
    assert (recorder.count("forward"), recorder.count("backward")) == (products, 8)


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian", **changes})


def train(model: Any, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapted(first: str, to: str = "clear", **changes: Any) -> Any:
    """A Llama with LoRA, outsourced before or after the adapters are added; the adapters are the same either way."""
    model = llama()
    if first == "outsource":
        ciphertune.outsource(model, to)
    torch.manual_seed(1)
    model = get_peft_model(model, config(**changes))
    if first == "lora":
        ciphertune.outsource(model, to)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_both_orders_train_as_plain_lora_does(targets: Any) -> None:
    plain = train(adapted("neither", target_modules=targets))
    assert plain[-1] < plain[0] - 0.1
    for first in ("lora", "outsource"):
        model = adapted(first, target_modules=targets)
        assert len(ciphertune.outsourced_layers(model)) == 14
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == sum(
            p.numel() for p in adapted("neither", target_modules=targets).parameters() if p.requires_grad
        )
        assert max(abs(a - b) for a, b in zip(train(model), plain, strict=True)) < 1e-4


def test_encrypted_training_follows_plain_lora() -> None:
    plain = train(adapted("neither"))
    for backend in ("simulation", "mlwe"):
        losses = train(adapted("lora", backend))
        assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < 0.02
        assert losses != plain


def test_loras_own_layers_are_never_outsourced() -> None:
    model = adapted("lora", target_modules="all-linear")
    for name, module in model.named_modules():
        if "lora_" in name:
            assert not isinstance(module, ciphertune.OutsourcedLinear)
    names = [layer.name for layer in ciphertune.outsourced_layers(model)]
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert not any("base_layer" in name or "lora" in name for name in names)


def test_layers_that_peft_keeps_whole_stay() -> None:
    model = get_peft_model(llama(), config(modules_to_save=["o_proj"]))
    ciphertune.outsource(model, "clear")
    assert not any("o_proj" in layer.name for layer in ciphertune.outsourced_layers(model))
    assert output(model).isfinite().all()


@pytest.mark.parametrize("first", ["lora", "outsource"])
def test_adapters_save_load_and_switch_off(first: str, tmp_path: Path) -> None:
    base = output(llama())
    model = adapted(first)
    train(model)
    tuned = output(model.eval())
    assert relative(tuned, base) > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(output(model), base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(output(loaded.eval()), tuned, rtol=1e-4, atol=1e-5)
    plain = model.unload()
    torch.testing.assert_close(output(plain), base)


@pytest.mark.parametrize("first", ["lora", "outsource"])
def test_merging_is_refused_by_the_layers_name(first: str) -> None:
    with pytest.raises(OutsourcedWeightError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        adapted(first).merge_and_unload()


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_adapters_made_from_the_weight_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(OutsourcedWeightError, match="need the original model"):
        adapted("outsource", **changes)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_adapters_made_from_nothing_work(init: Any) -> None:
    assert output(adapted("outsource", init_lora_weights=init)).isfinite().all()


def test_a_whole_model_is_not_saved(tmp_path: Path) -> None:
    model = ciphertune.outsource(llama(), "clear")
    with pytest.raises(OutsourcedWeightError, match="cannot be saved whole"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    ciphertune.restore(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(LlamaForCausalLM.from_pretrained(tmp_path).eval()), output(model))


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_stays_unless_asked_for(tied: bool) -> None:
    model, want = llama(tied), output(llama(tied))
    ciphertune.outsource(model, "clear")
    assert isinstance(model.lm_head, nn.Linear)
    assert not isinstance(model.lm_head, ciphertune.OutsourcedLinear)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(output(model), want)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("choice", ["all", "lm_head"])
def test_an_outsourced_head_is_untied_for_good(tied: bool, choice: str) -> None:
    model, want = llama(tied), output(llama(tied))
    ciphertune.outsource(model, "clear", choice)
    assert isinstance(model.lm_head, ciphertune.OutsourcedLinear)
    model.tie_weights()
    assert isinstance(model.lm_head, ciphertune.OutsourcedLinear)
    assert "lm_head.weight" not in model.state_dict()
    torch.testing.assert_close(output(model), want)
