"""Token embeddings and output heads whose weights are at the workers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import remote
import tiny as models
import torch
from click.testing import CliRunner
from farm import Farm
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import ciphertune
from ciphertune.callers import batch_of
from ciphertune.cli import cli
from ciphertune.errors import (
    ConfigError,
    InputError,
    NothingOutsourcedError,
    OutsourcedWeightError,
    UnsupportedLayerError,
)
from ciphertune.outsourcing import embedding
from ciphertune.outsourcing.embedding import OutsourcedEmbedding, tokens_at_once
from ciphertune.planning.plan import make_plan
from ciphertune.planning.shares import shares_of
from ciphertune.weights import describe, group_map, lookup_map, quantize
from ciphertune_mlwe.backend import MLWEBackend
from ciphertune_mlwe.params import NARROW, WIDE
from ciphertune_mlwe.public import KEPT_ROWS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
KINDS = ("llama", "llama-tied", "gpt2")
IDS = torch.tensor([[3, 3, 3, 17, 0, 47, 9, 3]])


def rounded(model: Any) -> Any:
    """The model with the weights that workers hold, in the clear."""
    return ciphertune.restore(ciphertune.outsource(model, "clear?weight_bits=8", "all", embeddings=True))


def rows_of(model: Any, ids: Tensor = IDS) -> Tensor:
    rows: Tensor = model.get_input_embeddings()(ids)
    return rows.detach()


def trained(model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "gate_proj", "c_attn"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for batch in batches:
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_request_of_lookups_takes_a_bounded_input() -> None:
    assert [tokens_at_once(rows) for rows in (49152, 128256, 1 << 22)] == [1280, 512, 256]


@pytest.mark.parametrize("to", ["clear?weight_bits=8", "simulation", "mlwe"])
@pytest.mark.parametrize("kind", KINDS)
def test_head_and_embedding_at_the_worker_train_and_generate_as_in_the_clear(kind: str, to: str) -> None:
    # In float32 of the codes that the workers hold, so that encryption is all that differs.
    plain = rounded(models.model(kind))
    ours = ciphertune.outsource(copy.deepcopy(plain), to, "all", embeddings=True)
    assert isinstance(ours.get_input_embeddings(), OutsourcedEmbedding)
    assert not any(p.shape == (48, 16) for p in ours.parameters())
    assert torch.allclose(rows_of(ours), rows_of(plain), atol=2e-3)
    prompt = {"input_ids": IDS[:, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    told = [m.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (ours, plain)]
    assert torch.equal(*told)
    batches = remote.batches(3)
    assert trained(ours, batches) == pytest.approx(trained(plain, batches), rel=3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_restore_gives_back_embedding_and_tie(kind: str) -> None:
    plain = models.model(kind)
    model: Any = ciphertune.outsource(copy.deepcopy(plain), "clear", "all", embeddings=True)
    assert ciphertune.share(model).at_client == sum(p.numel() for p in model.parameters())
    expected = sum(p.numel() for p in plain.parameters())
    assert ciphertune.share(model).outsourced + ciphertune.share(model).at_client == expected
    assert not [name for name in model.state_dict() if "embed_tokens" in name or "wte" in name or "lm_head" in name]
    model.tie_weights()
    twin = copy.deepcopy(model)
    assert torch.equal(rows_of(twin), rows_of(plain))
    ciphertune.restore(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(table) is nn.Embedding
    assert (head.weight is table.weight) == (kind != "llama")
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_encoder_needs_no_head() -> None:
    plain = models.model("bert")
    model = ciphertune.outsource(copy.deepcopy(plain), "clear", embeddings=True)
    assert torch.equal(rows_of(model), rows_of(plain))
    batch = {"input_ids": IDS, "labels": torch.tensor([1])}
    assert model(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=1e-4)


def test_a_tied_head_goes_along_and_the_worker_holds_one_copy() -> None:
    model = ciphertune.outsource(models.model("llama-tied"), "clear", embeddings=True)
    names = [layer.name for layer in ciphertune.outsourced_layers(model)]
    assert "lm_head" in names
    held: Any = ciphertune.session_of(model).worker
    assert "lm_head" in held.weights
    assert "model.embed_tokens" not in held.weights
    untied = ciphertune.outsource(models.model("llama"), "clear", embeddings=True)
    assert "lm_head" not in [layer.name for layer in ciphertune.outsourced_layers(untied)]


def test_a_worker_sees_how_many_tokens_and_not_whether_they_repeat(recorder: Any) -> None:
    model = ciphertune.outsource(models.model("llama"), "mlwe", embeddings=True, plugins=recorder.plugins)
    table: Any = model.get_input_embeddings()
    seen = []
    for ids in (torch.full((2, 6), 7), torch.arange(12).view(2, 6)):
        recorder.answered.clear()
        assert table(ids).shape == (2, 6, 16)
        seen.append(
            [(e.layers, e.direction, e.tokens, e.requests, e.bytes_up, e.bytes_down) for e in recorder.answered]
        )
    assert seen[0] == seen[1] == [(("model.embed_tokens",), "backward", 12, 1, 12 * 48 * 3, 12 * 16 * 3)]
    assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 16)


def test_tokens_of_several_callers_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_VALUES_AT_ONCE", 48 * 5)
    monkeypatch.setattr(embedding, "_TOKENS_STEP", 5)
    plain = models.model("llama-tied")
    model: Any = ciphertune.outsource(copy.deepcopy(plain), "mlwe", "all", embeddings=True)
    session = ciphertune.session_of(model)
    asked: list[Any] = []
    product = session.product

    def watched(group: int, direction: Any, x: Tensor, owners: Any = None, **known: Any) -> Tensor:
        asked.append((len(x), owners))
        return product(group, direction, x, owners, **known)

    monkeypatch.setattr(session, "product", watched)
    ids = torch.arange(12).view(3, 4)
    with batch_of(["a", "b", "b"]):
        rows = rows_of(model, ids)
    assert asked == [(5, (("a", 4), ("b", 1))), (5, (("b", 5),)), (2, (("b", 2),))]
    assert torch.allclose(rows, rows_of(rounded(plain), ids), atol=2e-3)


def test_dtype_hooks_and_modes_are_those_of_the_embedding_before() -> None:
    plain = models.model("llama").to(torch.bfloat16)
    seen: list[Any] = []
    plain.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(o.dtype))  # type: ignore[operator]
    model = ciphertune.outsource(plain, "clear", embeddings=True)
    assert rows_of(model).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]
    with torch.inference_mode():
        assert model.get_input_embeddings()(IDS.int()).shape == (1, 8, 16)  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    assert model.get_input_embeddings()(IDS).requires_grad  # type: ignore[operator]


def test_rows_cut_over_workers(farm: Farm) -> None:
    torch.manual_seed(0)
    plain: Any = models.llama(vocab_size=200, tie_word_embeddings=True).eval()
    linear = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    blocks = [[(name, 0, None)] for name in linear]
    farm.plant(plain, "mlwe", one=[*blocks, [("lm_head", 0, 64)]], two=[[("lm_head", 64, 200)]])
    expected = rows_of(rounded(copy.deepcopy(plain)), torch.arange(200))
    ciphertune.outsource(plain, farm.selection("mlwe"), embeddings=True)
    farm.sessions.append(ciphertune.session_of(plain))
    assert torch.allclose(rows_of(plain, torch.arange(200)), expected, atol=1e-4)


def test_a_lookup_in_a_large_vocabulary_is_exact_to_a_small_part_of_the_codes_own_rounding() -> None:
    torch.manual_seed(0)
    rows = KEPT_ROWS + 4000
    values = torch.randn(rows, 8)
    values[:, 3] *= 40  # A channel that sets the scale of every row, as real tables have.
    info = describe("table", weight := quantize(values, 8))
    backend = MLWEBackend()
    assert backend.parameters(group_map([info], "backward")) is WIDE
    assert backend.parameters(lookup_map(info)) is NARROW
    model: Any = models.llama(vocab_size=rows, hidden_size=8, intermediate_size=8)
    model.get_input_embeddings().weight.data.copy_(values)
    ciphertune.outsource(model, "mlwe", ["q_proj"], embeddings=True)
    ids = torch.tensor([[0, 5, rows - 1, KEPT_ROWS]])
    error = rows_of(model, ids)[0] - weight.dequantize()[ids[0]]
    step = weight.scale[ids[0]]  # type: ignore[index]
    assert float((error / step[:, None]).abs().max()) < 0.5


@pytest.mark.parametrize(
    "to", ["clear?weight_bits=8", "simulation", "mlwe", "mlwe?request_bits=24", "mlwe?pad_tokens=32"]
)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_plan_says_what_travels(kind: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_VALUES_AT_ONCE", 48 * 10)
    monkeypatch.setattr(embedding, "_TOKENS_STEP", 10)
    model: Any = models.model(kind)
    model.save_pretrained(tmp_path / "model")
    found = make_plan(str(tmp_path / "model"), to, tokens=24, layers="all", embeddings=True, measure=False)
    ciphertune.outsource(model, to, "all", embeddings=True)
    adapted = remote.with_adapter(model)
    adapted(**remote.batches(1)[0]).loss.backward()
    traffic = ciphertune.session_of(adapted).traffic
    assert (found.requests, found.bytes_up, found.bytes_down) == (
        traffic.requests,
        traffic.bytes_up,
        traffic.bytes_down,
    )
    lookups = [kind for kind in found.kinds if kind.layers.endswith("(lookup)")]
    assert [kind.requests for kind in lookups] == [3]
    part = ciphertune.share(adapted)
    assert (found.outsourced, found.at_client) == (part.outsourced, part.at_client - part.trainable)
    assert found.fraction == found.largest_fraction


def test_an_estimate_counts_lookups(tmp_path: Path) -> None:
    models.model("llama-tied").save_pretrained(tmp_path)  # type: ignore[operator]
    found = make_plan(str(tmp_path), tokens=24, embeddings=True)
    assert found.estimate is not None
    assert found.estimate.client_compute_measured
    assert found.estimate.total > 0


def test_a_bundle_over_zmq(tmp_path: Path, ciphertune_worker: Callable[..., Any]) -> None:
    plain: Any = models.model("llama-tied")
    plain.save_pretrained(tmp_path / "model")
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", layers="all", embeddings=True)
    kept = [name for file in bundle.client.glob("model-*.safetensors") for name in load_file(file)]
    assert all("norm" in name for name in kept)
    served = ciphertune_worker(bundle.workers[0])
    model = ciphertune.load_client(bundle.client, served.selection("mlwe"))
    batches = remote.batches(2)
    assert trained(model, batches) == pytest.approx(trained(rounded(plain), batches), rel=3e-3)
    assert ciphertune.share(model).outsourced == bundle.outsourced
    ciphertune.session_of(model).close()


@pytest.mark.parametrize("kind", [*KINDS, "bert"])
def test_a_split_model_looks_up_what_an_outsourced_one_does(kind: str, tmp_path: Path) -> None:
    from ciphertune.bundle.worker import load_worker
    from ciphertune.worker import Worker

    to = "clear?weight_bits=8"
    models.model(kind).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    outsourced = ciphertune.outsource(models.model(kind), to, "all", embeddings=True)
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", layers="all", embeddings=True)
    worker = Worker(load_worker(bundle.workers[0]))
    model = ciphertune.load_client(bundle.client, to, worker=worker)
    assert torch.equal(model(input_ids=IDS).logits, outsourced(input_ids=IDS).logits)
    assert bundle.fraction == pytest.approx(ciphertune.share(model).fraction, abs=0.02)
    alone = ciphertune.load_client(bundle.client, f"{to}&share_inputs=0", worker=worker)
    assert torch.equal(rows_of(alone), rows_of(model))


@pytest.mark.parametrize("names", [["model.elsewhere"], ["lm_head"], "model.embed_tokens", [3]])
def test_damaged_embeddings_in_a_manifest(names: Any, tmp_path: Path) -> None:
    bundle = ciphertune.split(models.model("llama"), tmp_path / "bundle", embeddings=True)
    file = bundle.client / "ciphertune.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "embeddings": names}))
    from ciphertune.bundle.worker import load_worker
    from ciphertune.worker import Worker

    with pytest.raises(ConfigError):
        ciphertune.load_client(bundle.client, "clear?weight_bits=8", worker=Worker(load_worker(bundle.workers[0])))


def _scaled(model: Any) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    model.set_input_embeddings(Scaled(48, 16))


def _renormalised(model: Any) -> None:
    model.get_input_embeddings().max_norm = 1.0


def _trained(model: Any) -> None:
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_scaled, "a behaviour of its own"), (_renormalised, "max_norm"), (_trained, "being trained")],
)
def test_embeddings_that_cannot_be_outsourced(change: Callable[[Any], None], message: str) -> None:
    model: Any = models.model("llama")
    change(model)
    with pytest.raises(UnsupportedLayerError, match=message):
        ciphertune.outsource(model, "clear", embeddings=True)
    assert not ciphertune.outsourced_layers(model)


def test_models_without_token_embeddings_and_with_outsourced_ones() -> None:
    with pytest.raises(NothingOutsourcedError, match="names no token embedding"):
        ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "clear", embeddings=True)
    model = ciphertune.outsource(models.model("llama"), "clear", embeddings=True)
    with pytest.raises(NothingOutsourcedError, match="at the workers already"):
        ciphertune.outsource(model, "clear", "all", embeddings=True)


def test_bad_ids_are_refused_without_naming_them(recorder: Any) -> None:
    model = ciphertune.outsource(models.model("llama"), "clear", embeddings=True, plugins=recorder.plugins)
    table: Any = model.get_input_embeddings()
    for bad in (torch.tensor([48]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(InputError) as caught:
            table(bad)
        assert "48]" not in str(caught.value)
    assert recorder.asked == []


def test_the_table_is_not_here_to_be_trained_or_changed() -> None:
    model: Any = ciphertune.outsource(models.model("llama"), "clear", embeddings=True)
    table = model.get_input_embeddings()
    with pytest.raises(OutsourcedWeightError):
        _ = table.weight + 1
    with pytest.raises(OutsourcedWeightError):
        table.weight = nn.Parameter(torch.zeros(48, 16))
    with pytest.raises(OutsourcedWeightError):
        table.reset_parameters()
    with pytest.raises(OutsourcedWeightError, match="modules_to_save"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))


def test_an_adapter_trained_without_the_embedding_loads_on_the_original(tmp_path: Path) -> None:
    plain = models.model("llama-tied")
    adapted = remote.with_adapter(ciphertune.outsource(copy.deepcopy(plain), "clear", "all", embeddings=True))
    trained_parameters = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in trained_parameters:
        nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    logits = [each.eval()(input_ids=IDS).logits for each in (loaded, adapted)]
    assert torch.allclose(*logits, atol=1e-4)


def test_shares_of_known_models() -> None:
    found = shares_of("smollm2")
    assert found.default == pytest.approx(0.789, abs=1e-3)
    assert found.with_head == pytest.approx(0.826, abs=1e-3)
    assert found.with_embeddings is not None
    assert found.with_embeddings > 0.999
    assert shares_of(nn.Sequential(nn.Linear(4, 4, bias=False))).with_embeddings is None
    shown = CliRunner().invoke(cli, ["share", "smollm2", "--json"], catch_exceptions=False)
    assert json.loads(shown.output)["smollm2"]["with_embeddings"] == found.with_embeddings
    table = CliRunner().invoke(cli, ["share", "smollm2"], catch_exceptions=False).output
    assert "78.92%" in table
    assert "99.97%" in table
