"""What a transformers model does by itself: weights that it reads, parameters that it makes frozen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import small
import torch
import transformers

import ciphertune
from ciphertune.errors import NothingOutsourcedError, OutsourcedWeightError
from ciphertune.outsourcing.trial import frozen_from_birth, weights_read

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


def marian() -> Any:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    config = transformers.MarianConfig(
        vocab_size=96, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, **sizes,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def test_weights_that_are_read_stay_with_a_word_and_nothing_else_happens() -> None:
    model, calls = mamba(), []
    model.backbone.layers[0].mixer.dt_proj.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"left at the client: .*0.mixer.dt_proj, .*1.mixer.dt_proj: the model's own"):
        ciphertune.outsource(model, "clear")
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert not model.training
    assert not any("dt_proj" in layer.name for layer in ciphertune.outsourced_layers(model))
    assert ciphertune.share(model).layers == 2 * 3


def test_named_they_are_outsourced_and_using_them_names_the_layer() -> None:
    model = mamba()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ciphertune.outsource(model, "clear", layers=["*mixer*"])
    with pytest.raises(OutsourcedWeightError, match=r"layers.0.mixer.dt_proj"):
        model(small.ids())


def test_a_split_leaves_them_out_too(tmp_path: Any) -> None:
    mamba().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="dt_proj"):
        assert ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle").layers == 6


def jamba() -> Any:
    config = transformers.JambaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=6, attn_layer_offset=5,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config).eval()


def test_weights_that_are_read_behind_experts_are_found() -> None:
    model = jamba()
    read = weights_read(model)
    found = [name for name, module in model.named_modules() if id(module) in read]
    assert found == [f"model.layers.{index}.mamba.dt_proj" for index in range(5)]
    wanted = model(small.ids()).logits
    with pytest.warns(UserWarning, match="dt_proj"):
        ciphertune.outsource(model, "clear")
    torch.testing.assert_close(model(small.ids()).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "LlamaModel"])
def test_most_models_read_none(name: str) -> None:
    model = small.model(name)
    assert weights_read(model) == set()
    assert frozen_from_birth(model) == set()


def test_what_cannot_be_tried_is_taken_as_it_is() -> None:
    model = small.model("BertModel")
    model.config.hidden_size = -1
    assert weights_read(model) == set()
    assert weights_read(torch.nn.Sequential(torch.nn.Linear(2, 2))) == set()


def test_parameters_frozen_from_birth_say_nothing_about_training() -> None:
    model = marian()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 2
    ciphertune.outsource(model, "clear")
    assert ciphertune.share(model).layers == 16
    ciphertune.restore(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen


def test_parameters_that_a_user_froze_do() -> None:
    model = marian()
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(NothingOutsourcedError, match="its weight is being trained"):
        ciphertune.outsource(model, "clear")
