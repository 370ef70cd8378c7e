"""Models of many kinds: outsourced, each computes, trains and saves as it does in the clear."""

from __future__ import annotations

import copy
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import warm
from torch import Tensor, nn

import ciphertune
from ciphertune.errors import CipherTuneError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*parametrizations.weight_norm.*:FutureWarning"),
]


def close(result: Tensor, wanted: Tensor, tolerance: float = 2e-2) -> None:
    error = float((result - wanted).norm() / wanted.norm().clamp(min=1e-12))
    assert error <= tolerance, f"relative error {error:.3g}"


def test_classifier_head_is_trained_and_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = small.model("LlamaForSequenceClassification", num_labels=3, num_key_value_heads=2)
    model = ciphertune.outsource(copy.deepcopy(plain), to="clear")
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], r=4))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "score" in n]
    batch = {"input_ids": small.ids(4), "labels": torch.tensor([0, 1, 2, 0])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(**batch).loss.item()
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        wanted = model(**batch)
    assert wanted.loss.item() < before - 0.05
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    close(loaded(**batch).logits.detach(), wanted.logits)


def test_double_backward() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = ciphertune.outsource(copy.deepcopy(plain), to="clear", layers=["2"])
    results = []
    for model in (plain, ours):
        x = torch.linspace(-1, 1, 64).reshape(4, 16).requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.square().sum().backward()
        results.append((x.grad, model[0].weight.grad))
    for result, wanted in zip(results[1], results[0], strict=True):
        close(result, wanted, 1e-5)  # type: ignore[arg-type]


def test_hooks_are_kept() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append("forward"))
    model[2].register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    ciphertune.outsource(model, to="clear", layers="all")
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]


def test_restore_gives_back_what_was() -> None:
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    )

    def kinds() -> dict[str, Any]:
        return {n: (type(m), m.weight.shape) for n, m in model.named_modules() if hasattr(m, "weight")}

    before, config = kinds(), model.config.to_dict()
    ciphertune.restore(ciphertune.outsource(model, to="clear", layers="all"))
    assert kinds() == before
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.transformer.wte.weight


def test_empty_input() -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Linear(16, 8)), to="mlwe", layers="all")
    x = torch.zeros(0, 16, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 16)
    assert torch.equal(model[0].bias.grad, torch.zeros(8))  # type: ignore[arg-type]


def test_subclass_of_linear() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    model = transformers.FalconForCausalLM(config).eval()
    wanted = model(input_ids=small.ids()).logits.detach()
    ciphertune.outsource(model, to="clear")
    close(model(input_ids=small.ids()).logits.detach(), wanted)
    assert ciphertune.share(model).layers >= 8
    ciphertune.restore(model)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"


def test_tied_head_stays_tied() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=96,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=2,
        expert_capacity=64,
        decoder_start_token_id=0,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    batch = {"input_ids": small.ids(), "labels": small.ids().flip(0)}
    wanted = model(**batch).loss.item()
    ciphertune.outsource(model, to="clear", layers="all")
    assert model(**batch).loss.item() == pytest.approx(wanted, rel=0.02)
    model.tie_weights()
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model(**batch).loss.item() == pytest.approx(wanted, rel=0.02)


def test_half_precision_scaler() -> None:
    torch.manual_seed(0)
    outsourced = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    ciphertune.outsource(outsourced, to="mlwe", layers=["0"])
    model = nn.Sequential(nn.Linear(16, 16), outsourced)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(8, 16)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x).float().square().mean() * 1e3
        scaler.scale(loss * 1e30).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**37
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weight_norm_is_refused() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 2))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(CipherTuneError, match="0 cannot be outsourced: its weight is computed"):
        ciphertune.outsource(model, to="clear", layers=["0", "2"])
    ciphertune.outsource(model, to="clear", layers="all")
    assert [name for name, _ in model.named_parameters()] == [name for name in names if name != "2.weight"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use() -> None:
    code = """
        import os, signal, torch, ciphertune
        model = ciphertune.outsource(torch.nn.Sequential(torch.nn.Linear(64, 64)), to="mlwe", layers="all")
        model(torch.randn(300, 64))
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            try:
                model(torch.randn(300, 64))
            except ciphertune.CipherTuneError as error:
                print("refused:", error, flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the child hung or died"
        model(torch.randn(300, 64))
    """
    done = warm.run(textwrap.dedent(code), preload=warm.TORCH)
    assert done.returncode == 0, done.stderr
    assert "another process" in done.stdout


def test_fused_experts_are_outsourced() -> None:
    model = small.model("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    whole = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    wanted = model(input_ids=small.ids()).logits.detach()
    ciphertune.outsource(model, to="clear")
    close(model(input_ids=small.ids()).logits.detach(), wanted)
    assert ciphertune.share(model).outsourced > 0.9 * whole, ciphertune.validate(model)


def test_frozen_parameter_from_birth() -> None:
    import transformers

    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=96,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    ciphertune.outsource(model, to="clear")
    assert ciphertune.share(model).layers >= 10


def test_weight_that_is_read() -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).eval()
    wanted = model(input_ids=small.ids()).logits.detach()
    with pytest.warns(UserWarning, match=r"backbone.layers.0.mixer.dt_proj"):
        ciphertune.outsource(model, to="clear")
    close(model(input_ids=small.ids()).logits.detach(), wanted)
    assert ciphertune.share(model).layers == 3


def test_nothing_left_for_lora_is_said() -> None:
    from peft import LoraConfig, get_peft_model

    model = ciphertune.outsource(nn.Sequential(nn.Linear(16, 16, bias=False)), to="clear", layers="all")
    assert list(model.state_dict()) == []
    model.load_state_dict({})
    model = get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    model(torch.randn(2, 16)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    assert list(ciphertune.restore(model.unload()).state_dict()) == ["0.weight"]


def embedded(bundle: Any) -> Any:
    """The model of a bundle, its worker in this process."""
    from ciphertune.bundle.worker import load_worker
    from ciphertune.worker.worker import Worker

    return ciphertune.load_client(
        bundle.client, to="clear?weight_bits=16", worker=Worker(load_worker(bundle.workers[0]))
    )


def vit() -> tuple[Any, dict[str, Tensor]]:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTModel(config), {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


def wav2vec2() -> tuple[Any, dict[str, Tensor]]:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_kernel=(4, 4),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2Model(config), {"input_values": torch.linspace(-1, 1, 400).sin().view(2, 200)}


def gpt_neox() -> tuple[Any, dict[str, Tensor]]:
    changes = {"bos_token_id": 1, "eos_token_id": 2}
    return small.model("GPTNeoXForCausalLM", **changes), {"input_ids": small.ids()}


def mixtral() -> tuple[Any, dict[str, Tensor]]:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return small.model("MixtralForCausalLM", **changes), {"input_ids": small.ids()}


# peft's own settings for mixtures of experts, of which these targets match some.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("make", [vit, wav2vec2, gpt_neox, mixtral])
def test_bundles_of_models_whose_tensors_are_renamed(make: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, inputs = make()
    model.eval().save_pretrained(tmp_path / "model")
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16)
    client = embedded(bundle)
    with torch.no_grad():
        close(client(**inputs)[0], model(**inputs)[0], 1e-3)
    assert bundle.layers == ciphertune.share(client).layers >= 6
    adapted = get_peft_model(client, LoraConfig(r=2, target_modules="all-linear"))
    ciphertune.LoraTrainer(adapted).save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
