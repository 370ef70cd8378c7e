"""Mixtures of experts whose weights are stacked: outsourced expert by expert, with routing that no worker sees."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.callers import batch_of
from ciphertune.cli import cli
from ciphertune.errors import ConfigError, InputError, OutsourcedWeightError, SecurityError, UnsupportedLayerError
from ciphertune.outsourcing.experts import outsourced_experts
from ciphertune.planning.plan import make_plan
from ciphertune.worker.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FEW = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": FEW,
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**QWEN, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1},
    "DeepseekV3": DEEPSEEK,
    "GptOss": {**FEW, "head_dim": 8},
}
APART = {**FEW, "head_dim": 8, "intermediate_size_mlp": 64, "moe_layers": [0, 1]}


def mixture(kind: str = "Mixtral", **changes: Any) -> Any:
    if kind == "Llama4":
        torch.manual_seed(0)
        found: Any = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**(small.COMMON | APART))).eval()
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.05)
        return found
    if kind != "Dbrx":
        return small.model(f"{kind}ForCausalLM", **(MIXTURES[kind] | changes))
    torch.manual_seed(0)
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config).eval()


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of every parameter that has one."""
    model.zero_grad()
    result = model(input_ids=small.ids(), labels=small.ids().flip(0))
    result.loss.backward()
    return result.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(model: Any, plain: Any, tolerance: float = 1e-5) -> None:
    (logits, gradients), (wanted, expected) = trained(model), trained(plain)
    assert (logits - wanted).norm() <= tolerance * wanted.norm()
    assert any("norm" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 10 * tolerance * expected[name].norm(), name


def share_of_blocks(model: Any, plain: Any) -> float:
    outside = ("embed", "lm_head", "wte")
    whole = sum(p.numel() for n, p in plain.named_parameters() if not any(part in n for part in outside))
    return ciphertune.share(model).outsourced / whole


@pytest.mark.parametrize("to", ["clear", "clear?experts=routed"])
@pytest.mark.parametrize("kind", [*MIXTURES, "Dbrx", "Llama4"])
def test_forward_backward_and_back_again(kind: str, to: str) -> None:
    plain = mixture(kind)
    model = ciphertune.outsource(copy.deepcopy(plain), to)
    same(model, plain)
    assert share_of_blocks(model, plain) > 0.9
    assert ciphertune.validate(plain).keys() <= {f"model.layers.{i}.feed_forward.router" for i in (0, 1)}
    before = {name: (p.shape, p.requires_grad) for name, p in plain.named_parameters()}
    ciphertune.restore(model)
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    same(model, plain, 1e-7)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("to", ["mlwe", "mlwe?experts=routed"])
def test_encrypted(to: str) -> None:
    plain = mixture()
    same(ciphertune.outsource(copy.deepcopy(plain), to), plain, 0.01)


def test_norms_after_experts() -> None:
    experts = transformers.models.muse_spark.modeling_muse_spark
    config = transformers.MuseSparkTextConfig(
        num_local_experts=3, moe_hidden_size=16, moe_intermediate_size=8, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    plain = nn.Sequential(experts.MuseSparkExperts(config))
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    x, weights = torch.randn(6, 16), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
    wanted = plain[0](x, chosen, weights)
    for to in ("clear", "clear?experts=routed"):
        model = ciphertune.outsource(copy.deepcopy(plain), to)
        torch.testing.assert_close(model[0](x, chosen, weights), wanted, rtol=1e-4, atol=1e-4)


def requests(recorder: Any, model: Any) -> list[Any]:
    seen = len(recorder.answered)
    model(input_ids=small.ids(), labels=small.ids()).loss.backward()
    return [(e.layers, e.direction, e.tokens) for e in recorder.answered[seen:] if "experts" in e.layers[0]]


def test_nothing_of_routing_shows_unless_it_is_said(recorder: Any, caplog: pytest.LogCaptureFixture) -> None:
    sent = []
    for to in ("clear", "clear?experts=routed"):
        with caplog.at_level(logging.WARNING, "ciphertune"):
            caplog.clear()
            model = ciphertune.outsource(mixture(), to, plugins=recorder.plugins)
        assert ("workers see how many tokens" in caplog.text) == ("routed" in to)
        before = requests(recorder, model)
        # Another router sends everything to the first two experts.
        for layer in model.model.layers:
            with torch.no_grad():
                layer.mlp.gate.weight.zero_()
        sent.append((before, requests(recorder, model)))
    (before, after), (routed, otherwise) = sent
    assert before == after
    # Two layers, two sides, two passes; every token to all experts at once.
    assert len(before) == 8
    assert {tokens for _, _, tokens in before} == {16}
    assert {len(layers) for layers, _, _ in before} == {4}
    assert sorted(routed) != sorted(otherwise)
    assert {len(layers) for layers, _, _ in routed} == {1}


def test_experts_without_tokens_and_tokens_without_experts() -> None:
    plain = mixture(experts_implementation="eager")
    module, original = ciphertune.outsource(copy.deepcopy(plain), "clear"), plain.model.layers[0].mlp.experts
    experts = outsourced_experts(module)[0]
    x = torch.randn(5, 32)
    chosen, weights = torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
    # One expert twice; none is what a number beyond the last stands for.
    chosen[2:, 1] = 4
    torch.testing.assert_close(experts(x, chosen, weights), original(x, chosen, weights))
    assert experts(x[:0], chosen[:0], weights[:0]).shape == (0, 32)
    with pytest.raises(InputError, match="5 tokens, but routing of 4"):
        experts(x, chosen[:4], weights[:4])
    with pytest.raises(InputError, match=r"expected a floating-point input of shape \(…, 32\)"):
        experts(x[:, :8], chosen, weights)


def test_many_tokens_go_in_several_requests(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixture()
    model = ciphertune.outsource(copy.deepcopy(plain), "clear", plugins=recorder.plugins)
    monkeypatch.setattr("ciphertune.outsourcing.experts.tokens_at_once", lambda features: 6)
    same(model, plain)
    sizes = {e.tokens for e in recorder.answered if "experts" in e.layers[0]}
    assert sizes == {6, 4}


def test_double_backward() -> None:
    plain = mixture(experts_implementation="eager").model.layers[0].mlp.double()
    results = []
    for module in (plain, ciphertune.outsource(copy.deepcopy(plain), "clear")):
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).sin().reshape(1, 3, 32).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


def each_example(block: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: block(row).square().sum()))(x)


def forward_mode(block: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.func.jvp(block, (x[0],), (x[1],))[1]
    return result


def batch_of_gradients(block: Any, x: Tensor) -> Tensor:
    row = x[0].clone().requires_grad_()
    y = block(row)
    return torch.autograd.grad(y, row, torch.stack([y.detach(), y.detach().flip(-1)]), is_grads_batched=True)[0]


@pytest.mark.parametrize("transform", [each_example, forward_mode, batch_of_gradients])
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_transforms(transform: Any) -> None:
    plain = mixture(experts_implementation="batched_mm")
    model = ciphertune.outsource(copy.deepcopy(plain), "clear")
    x = torch.linspace(-1, 1, 384).sin().reshape(3, 1, 4, 32)
    wanted, found = (transform(each.model.layers[0].mlp, x) for each in (plain, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("to", ["clear?weight_bits=8", "clear?weight_bits=8&experts=routed", "mlwe"])
def test_channels_with_outliers_stay(kind: str, to: str) -> None:
    plain = nn.Sequential(mixture(kind, experts_implementation="eager").model.layers[0].mlp)
    x = torch.linspace(-1, 1, 512).mul(99).sin().reshape(1, 16, 32)
    x[..., 5] *= 300
    calibration = ciphertune.calibrate(plain, [x])
    errors = []
    for known in (None, calibration):
        y = x.clone().requires_grad_()
        model = ciphertune.outsource(copy.deepcopy(plain), to, calibration=known)
        found, wanted = model(y), plain(x)
        found, wanted = (each[0] if isinstance(each, tuple) else each for each in (found, wanted))
        errors.append(float((found - wanted).detach().norm() / wanted.detach().norm()))
        found.sum().backward()
        assert y.grad is not None
    kept = {info.kept.inputs.tolist() == [5] for info in outsourced_experts(model)[0].infos if info.kept is not None}
    assert kept == {True}
    assert errors[1] < 0.5 * errors[0]


def test_tokens_that_are_not_finite() -> None:
    model = ciphertune.outsource(mixture(), "clear")
    experts = outsourced_experts(model)[0]
    x, weights = torch.randn(4, 32), torch.rand(4, 2)
    x[1, 2] = torch.nan
    y = experts(x, torch.tensor([[0, 1]] * 4), weights)
    assert y.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("to", ["clear?weight_bits=16", "clear?weight_bits=16&experts=routed"])
def test_bundles(tmp_path: Path, kind: str, to: str) -> None:
    plain = mixture(kind)
    plain.save_pretrained(tmp_path / "model")
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16, workers=2)
    kept = bundle.at_client - sum(p.numel() for n, p in plain.named_parameters() if "embed" in n or "lm_head" in n)
    assert bundle.outsourced > 0.9 * (bundle.outsourced + kept)
    assert not any(b"experts.gate_up_proj.safe" in f.read_bytes() for f in bundle.client.glob("*.json"))
    whole = ciphertune.split(str(tmp_path / "model"), tmp_path / "whole", weight_bits=16)
    client = ciphertune.load_client(whole.client, to, worker=Worker(load_worker(whole.workers[0])))
    same(client, plain, 1e-3)
    assert ciphertune.share(client).layers == whole.layers == bundle.layers


def test_experts_go_together_or_stay() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0\.mlp\.experts cannot be outsourced in part"):
        ciphertune.outsource(mixture(), "clear", layers=["model.layers.0.mlp.experts.gate_up_proj"])
    model = ciphertune.outsource(mixture(), "clear", layers=["model.layers.0.mlp.experts"])
    assert [experts.name for experts in outsourced_experts(model)] == ["model.layers.0.mlp.experts"]
    assert ciphertune.share(model).layers == 8
    same(model, mixture())
    none = ciphertune.outsource(mixture(), "clear", layers=["q_proj"])
    assert outsourced_experts(none) == []


def test_the_absent_weights_say_so() -> None:
    model = ciphertune.outsource(mixture(), "clear")
    experts = outsourced_experts(model)[0]
    assert experts.gate_up_proj.shape == (4, 128, 32)
    with pytest.raises(OutsourcedWeightError, match=r"0\.mlp\.experts\.gate_up_proj' is at the workers"):
        experts.gate_up_proj * 2
    with pytest.raises(OutsourcedWeightError, match="assignment"):
        experts.down_proj = nn.Parameter(torch.zeros(4, 32, 64))
    assert not any("experts" in name for name in model.state_dict())
    other = copy.deepcopy(model)
    same(other, mixture())


def test_adapters_of_attention_and_of_experts() -> None:
    targets = {"target_modules": ["q_proj", "v_proj"], "r": 2}
    model = get_peft_model(ciphertune.outsource(mixture(), "clear"), LoraConfig(**targets))
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n and trained(model))
    of_experts = {**targets, "target_parameters": ["mlp.experts.gate_up_proj"]}
    first = get_peft_model(mixture(), LoraConfig(**of_experts))
    with pytest.warns(UserWarning, match="% of the weights .* peft trains adapters of the experts' parameters"):
        ciphertune.outsource(first, "clear")
    assert outsourced_experts(first) == []
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        get_peft_model(ciphertune.outsource(mixture(), "clear"), LoraConfig(**of_experts))


def test_several_callers_in_one_batch() -> None:
    model = ciphertune.outsource(mixture(), "mlwe")
    ciphertune.session_of(model).keep_apart()
    wanted = mixture()(input_ids=small.ids()).logits
    with torch.no_grad(), batch_of(["a", "b"]):
        logits = model(input_ids=small.ids()).logits
        assert (logits - wanted).norm() < 0.02 * wanted.norm()
        experts = outsourced_experts(model)[0]
        with pytest.raises(SecurityError, match="does not tell which"):
            experts(torch.randn(4, 32), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))


def switch() -> Any:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=2,
        expert_capacity=64, decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def test_experts_that_are_layers_of_their_own_go_only_if_routing_is_sent(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match=r"% of the weights .*experts\.expert_0\.wi.*experts=routed sends it"),
        pytest.warns(UserWarning, match="router.classifier"),
    ):
        model = ciphertune.outsource(switch(), "clear")
    assert not any("expert_" in layer.name for layer in ciphertune.outsourced_layers(model))
    with pytest.warns(UserWarning, match="router.classifier"):
        routed = ciphertune.outsource(switch(), "clear?experts=routed")
    assert any("expert_" in layer.name for layer in ciphertune.outsourced_layers(routed))
    with pytest.raises(UnsupportedLayerError, match="experts=routed"):
        ciphertune.outsource(switch(), "clear", layers=["encoder.block.1.layer.1.mlp.experts.expert_0.wi"])
    switch().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="router.classifier"):
        bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16, experts="routed")
    worker = Worker(load_worker(bundle.workers[0]))
    with pytest.raises(ConfigError, match=r"expert_0\.wi: .*Say so in the selection string"):
        ciphertune.load_client(bundle.client, "clear?weight_bits=16", worker=worker)
    client = ciphertune.load_client(bundle.client, "clear?weight_bits=16&experts=routed", worker=worker)
    batch = {"input_ids": small.ids(), "decoder_input_ids": small.ids()}
    wanted = switch()(**batch).logits
    assert (client(**batch).logits - wanted).norm() < 1e-2 * wanted.norm()


def test_stacked_weights_that_cannot_be_taken_apart_are_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("th,ehk->tk", x, self.stack)

    model = nn.Sequential(nn.Linear(8, 8), Own())
    why = "it holds several matrices, with which Own computes in code of its own"
    assert ciphertune.validate(model) == {"1.stack": why}
    with pytest.warns(UserWarning, match=rf"75% of the weights .*: 1\.stack: {why}"):
        ciphertune.outsource(model, "clear")


@pytest.mark.parametrize("kind", ["Mixtral", "Dbrx", "Llama4"])
def test_a_plan_states_what_a_step_sends(tmp_path: Path, kind: str) -> None:
    targets = ("Wqkv" if kind == "Dbrx" else "q_proj",)
    plain = mixture(kind)
    plain.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    plan = make_plan(str(tmp_path), "mlwe", tokens=16, targets=targets, measure=False)
    model = get_peft_model(ciphertune.outsource(plain, "mlwe"), LoraConfig(target_modules=list(targets), r=2))
    session = ciphertune.session_of(model)
    model(input_ids=small.ids(), labels=small.ids()).loss.backward()
    assert (session.traffic.bytes_up, session.traffic.bytes_down) == (plan.bytes_up, plan.bytes_down)
    assert plan.outsourced == ciphertune.share(model).outsourced
    assert {k.layers for k in plan.kinds} >= {
        "Mixtral": {"gate_up_proj ×4", "down_proj ×4"}, "Dbrx": {"w1 ×4+v1 ×4", "w2 ×4"},
        "Llama4": {"gate_up_proj", "down_proj"}
    }[kind]  # fmt: skip
    measured = make_plan(str(tmp_path), "mlwe", tokens=16, targets=targets)
    assert measured.estimate is not None
    assert measured.estimate.client_compute_measured
    fewer = make_plan(str(tmp_path), "mlwe?experts=routed", tokens=16, targets=targets, measure=False)
    assert fewer.bytes_down < plan.bytes_down or kind == "Llama4"


def test_a_plan_says_what_stays_and_what_the_disk_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch().save_pretrained(tmp_path)
    told = []
    for free in (1 << 40, 1000):
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        command = ["plan", str(tmp_path), "--no-measure", "--target", "q"]
        with pytest.warns(UserWarning, match="left at the client"):
            result = CliRunner().invoke(cli, command, env={"COLUMNS": "500"})
        assert result.exit_code == 0, result.output
        told.append(" ".join(result.output.split()))
    assert "encoder.block.1.layer.1.mlp.experts.expert_0.wi and 7 more (it is an expert's that gets what" in told[0]
    assert "router.classifier and 1 more (the model's own code reads its weight)" in told[0]
    assert ["has room for" in each for each in told] == [False, True]
