"""Outsourcing whole models and taking them back, against the models themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ciphertune
from ciphertune import OutsourcedLinear
from ciphertune.errors import (
    NothingOutsourcedError,
    OutsourcedWeightError,
    PrecisionError,
    SecurityError,
    TransportError,
    UnknownLayerError,
    UnsupportedLayerError,
    WorkerError,
)
from ciphertune.plugins import registry

Tiny = Callable[[str], nn.Module]


def embedded(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of an uneven sum of them with respect to the embeddings."""
    leaf = x.clone().requires_grad_()
    logits = model(inputs_embeds=leaf).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    return logits.detach(), gradient


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def quantized_by_hand(model: nn.Module, names: list[str], top: int) -> nn.Module:
    model = copy.deepcopy(model)
    for name in names:
        weight = model.get_submodule(name).weight
        channel = 0 if isinstance(model.get_submodule(name), Conv1D) else 1
        scale = weight.detach().abs().amax(channel, keepdim=True) / top
        weight.data = (weight.detach() / scale).round() * scale
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_models_against_themselves(tiny: Tiny, name: str, layers: Any, bits: int) -> None:
    original = tiny(name)
    model = ciphertune.outsource(tiny(name), f"clear?weight_bits={bits}", layers=layers)
    names = [layer.name for layer in ciphertune.outsourced_layers(model)]
    assert len(names) >= 8
    # The embeddings are handed in, so that rounding a tied head does not change them.
    reference = original if bits == 32 else quantized_by_hand(original, names, {8: 127, 16: 32639}[bits])
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    results, expected, exact = embedded(model, x), embedded(reference, x), embedded(original, x)
    for result, wanted, unrounded in zip(results, expected, exact, strict=True):
        assert relative(result, wanted) < 2e-5
        if bits == 8:
            assert relative(result, unrounded) > 1e-3, "the weights were not rounded at all"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("to", ["simulation", "mlwe"])
def test_models_under_encryption_and_its_simulation(tiny: Tiny, name: str, to: str) -> None:
    model = ciphertune.outsource(tiny(name), to)
    # What is left beside quantization is the noise.
    reference = quantized_by_hand(tiny(name), [layer.name for layer in ciphertune.outsourced_layers(model)], 127)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    for result, wanted in zip(embedded(model, x), embedded(reference, x), strict=True):
        assert 0 < relative(result, wanted) < 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_a_tied_head_stays_by_default(tiny: Tiny, name: str) -> None:
    model = ciphertune.outsource(tiny(name), "clear")
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight is model.get_input_embeddings().weight
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
@pytest.mark.parametrize("layers", ["all", "lm_head", ["*"]])
def test_a_tied_head_is_untied_knowingly(tiny: Tiny, name: str, layers: Any) -> None:
    original, model = tiny(name), tiny(name)
    ciphertune.outsource(model, "clear", layers=layers)
    ids = torch.tensor([[1, 2, 3, 40]])
    expected = original(ids).logits
    for recompute in (True, False):  # ties anew from the configuration, or as noted when the model was made
        head = model.get_output_embeddings()
        assert isinstance(head, OutsourcedLinear)
        assert head.weight.numel() == 0
        assert not any(key.startswith("lm_head") for key in model.state_dict())
        assert not any(key.startswith("lm_head") for key, _ in model.named_parameters())
        assert relative(model(ids).logits, expected) < 1e-5
        model.tie_weights(recompute_mapping=recompute)
    assert isinstance(model.get_output_embeddings(), OutsourcedLinear)
    assert model.get_output_embeddings().weight.numel() == 0
    assert model.get_input_embeddings().weight.shape == (48, 16)
    copied = copy.deepcopy(model)
    copied.tie_weights()
    assert relative(copied(ids).logits, expected) < 1e-5


def test_the_model_itself_is_changed_and_returned() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert ciphertune.outsource(model, "clear") is model
    assert isinstance(model[0], OutsourcedLinear)
    assert ciphertune.restore(model) is model


def test_conv1d(tiny: Tiny) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(Conv1D(5, 3))
    nn.init.normal_(reference[0].bias)  # type: ignore[arg-type]
    model = ciphertune.outsource(copy.deepcopy(reference), "clear")
    assert (model[0].in_features, model[0].out_features) == (3, 5)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(model(x), reference(x))
    restored = ciphertune.restore(model)
    assert type(restored[0]) is Conv1D
    assert torch.equal(restored[0].weight, reference[0].weight)  # type: ignore[arg-type]
    torch.testing.assert_close(restored(x), reference(x))


def test_one_module_in_several_places() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    reference = nn.Sequential(shared, nn.Tanh(), shared)
    model = ciphertune.outsource(copy.deepcopy(reference), "clear")
    assert len(ciphertune.outsourced_layers(model)) == 2
    assert model[0].bias is model[2].bias
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), reference(x))
    assert list(ciphertune.restore(model).state_dict()) == list(reference.state_dict())
    torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_the_inverse_under_clear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 3, bias=False)).eval()).to(dtype)
    model = ciphertune.outsource(copy.deepcopy(original), "clear")
    session = ciphertune.session_of(model)
    ciphertune.restore(model)
    assert session.closed
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [m.training for m in model.modules()] == [m.training for m in original.modules()]
    restored, expected = model.state_dict(), original.state_dict()
    assert restored.keys() == expected.keys()
    for key, value in expected.items():
        assert restored[key].dtype == dtype
        assert torch.equal(restored[key], value), key
    assert model[0].weight.requires_grad
    with pytest.raises(NothingOutsourcedError, match="call ciphertune.outsource"):
        ciphertune.restore(model)
    ciphertune.outsource(model, "clear")
    assert ciphertune.share(model).layers == 2


def test_restore_keeps_what_was_trained_and_the_dtype_moved_to() -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "clear?weight_bits=8").to(torch.bfloat16)
    with torch.no_grad():
        model[0].bias.fill_(3)
    ciphertune.restore(model)
    assert (model[0].weight.dtype, model[0].bias.tolist()) == (torch.bfloat16, [3] * 4)


def test_restore_gives_the_rounded_weights() -> None:
    original = nn.Sequential(nn.Linear(8, 8))
    model = ciphertune.restore(ciphertune.outsource(copy.deepcopy(original), "clear?weight_bits=8"))
    rounded = quantized_by_hand(original, ["0"], 127)
    torch.testing.assert_close(model[0].weight, rounded[0].weight, check_dtype=True)
    assert not torch.equal(model[0].weight, original[0].weight)  # type: ignore[arg-type]


def test_layers_outsourced_in_several_calls(recorder: Any) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model = copy.deepcopy(original)
    ciphertune.outsource(model, "clear", layers="2", plugins=recorder.plugins)
    first = ciphertune.session_of(model)
    ciphertune.outsource(model, "clear?weight_bits=16", layers="0", plugins=recorder.plugins)
    assert len({layer.group.session for layer in ciphertune.outsourced_layers(model)}) == 2  # type: ignore[attr-defined]
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)
    assert recorder.products("forward") == [("0",), ("2",)]
    ciphertune.restore(model)
    assert first.closed
    assert recorder.closed == recorder.opened[::-1]
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)


def test_outsourcing_again_finds_nothing() -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Linear(2, 2)), "clear")
    with pytest.raises(NothingOutsourcedError, match="outsourced already"):
        ciphertune.outsource(model, "clear")


def test_share(tiny: Tiny) -> None:
    original = tiny("llama")
    total = sum(p.numel() for p in original.parameters())
    head_and_embedding, norms = 2 * 48 * 16, 5 * 16
    model = ciphertune.outsource(tiny("llama").requires_grad_(False), "clear")
    share = ciphertune.share(model)
    assert (share.outsourced, share.at_client) == (total - head_and_embedding - norms, head_and_embedding + norms)
    assert (share.layers, share.trainable) == (14, 0)
    assert share.fraction == pytest.approx(share.outsourced / total)
    before = ciphertune.share(original)
    assert (before.outsourced, before.at_client, before.trainable, before.layers) == (0, total, total, 0)
    assert before.fraction == 0
    assert ciphertune.share(nn.ReLU()).fraction == 0


def test_a_full_save_is_refused(tiny: Tiny, tmp_path: Any) -> None:
    model = ciphertune.outsource(tiny("llama"), "clear")
    with pytest.raises(OutsourcedWeightError, match=r"restore\(model\)"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    ciphertune.restore(model)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").state_dict()  # type: ignore[attr-defined]
    original = tiny("llama").state_dict()
    assert loaded.keys() == original.keys()
    for key, value in original.items():
        assert torch.equal(loaded[key], value), key


def _fail(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "error", "expected"),
    [
        ("client", OSError("key file"), OSError),
        ("worker", ValueError("boom"), WorkerError),
        ("refuse_imprecise", PrecisionError("too large"), PrecisionError),
        ("connect", TransportError("nobody there"), TransportError),
    ],
)
def test_an_error_leaves_the_model_as_it_was(
    tiny: Tiny, register: Any, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, expected: type
) -> None:
    clear = registry.load(registry.BACKENDS, "clear")
    local = registry.load(registry.TRANSPORTS, "local")
    attributes: dict[str, Any] = {"name": "failing"}
    if place == "connect":
        monkeypatch.setattr(local, "connect", _fail(error))
    else:
        attributes[place] = classmethod(_fail(error)) if place == "worker" else _fail(error)
    register(registry.BACKENDS, type("Failing", (clear,), attributes))
    unchanged(tiny("gpt2"), expected, "failing", "all")


@pytest.mark.parametrize(
    ("to", "layers", "expected"),
    [
        ("clear", "no_such_layer", UnknownLayerError),
        ("clear", ["c_attn", "wte"], UnknownLayerError),
        ("clear", nn.Conv2d, NothingOutsourcedError),
        ("clear?weight_bits=4", "all", ValueError),
        ("nothing", "all", ValueError),
        ("clear+local://host", "all", ValueError),
    ],
)
def test_a_wrong_call_leaves_the_model_as_it_was(tiny: Tiny, to: str, layers: Any, expected: type) -> None:
    unchanged(tiny("gpt2"), expected, to, layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(tiny: Tiny, value: float) -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 2] = value
    for to in ("clear", "clear?weight_bits=8"):
        error = unchanged(model, UnsupportedLayerError, to, None)
        assert "transformer.h.1.mlp.c_proj cannot be outsourced: the weight holds NaN or infinity" in str(error)


def unchanged(model: nn.Module, expected: type[Exception], to: str, layers: Any) -> Exception:
    """The error of outsourcing, after checking that it left no trace on the model."""
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict(keep_vars=True).items()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = model.config.to_dict()
    attributes = set(vars(model))
    with pytest.raises(expected) as caught:
        ciphertune.outsource(model, to, layers=layers)
    assert all(module is modules[name] for name, module in model.named_modules(remove_duplicate=False))
    assert {key for key, _ in model.named_modules()} == modules.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) or not bool(torch.isfinite(value).all()), key
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert (model.config.to_dict(), set(vars(model))) == (config, attributes)
    assert ciphertune.outsourced_layers(model) == []
    return caught.value


def test_a_refused_opening_drops_the_link_and_the_keys(register: Any) -> None:
    closed: list[str] = []
    clear, local = registry.load(registry.BACKENDS, "clear"), registry.load(registry.TRANSPORTS, "local")

    class Refusing(clear):
        name = "refusing"

        def client(self, device: torch.device) -> Any:
            client = super().client(device)
            client.close = lambda: closed.append("client")
            return client

        @classmethod
        def worker(cls, *_: Any) -> Any:
            raise ValueError

    class Watched(local):
        name = "watched"

        def connect(self, *arguments: Any) -> Any:
            (link,) = super().connect(*arguments)
            link.close = lambda: closed.append("link")
            return [link]

    register(registry.BACKENDS, Refusing)
    register(registry.TRANSPORTS, Watched)
    with pytest.raises(WorkerError, match="ValueError") as caught:
        ciphertune.outsource(nn.Sequential(nn.Linear(2, 2)), "refusing+watched://")
    assert caught.value.code == "internal"
    assert sorted(closed) == ["client", "link"]


def test_a_closed_session_says_so(tiny: Tiny) -> None:
    model = ciphertune.outsource(tiny("llama"), "clear")
    session = ciphertune.session_of(model)
    assert (session.closed, len(session.layers), session.security.encrypted) == (False, 14, False)
    assert repr(session) == "Session('clear', 14 layers)"
    session.close()
    assert session.closed
    with pytest.raises(SecurityError, match=r"the session is closed; model.layers.0.self_attn.q_proj.*\(forward\)"):
        model(torch.tensor([[1, 2]]))


def test_a_layer_with_an_evaluator_of_another_kind_beside_outsourced_ones() -> None:
    from ciphertune.linear import OutsourcedLinear
    from ciphertune.weights import describe, quantize

    class Elsewhere:
        to = "elsewhere"

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

        def output(self, member: int, x: torch.Tensor, half: bool) -> torch.Tensor:
            return x.float() @ self.weight.t()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(3, 8)
    expected = model(x)
    first: Any = model[0]
    info = describe("0", quantize(first.weight.detach(), None))
    model[0] = OutsourcedLinear(info, first.bias, Elsewhere(first.weight.detach()), 0, torch.empty(0))
    with pytest.raises(ciphertune.errors.NothingOutsourcedError):
        ciphertune.session_of(model)
    ciphertune.outsource(model, "clear", ["2"])
    torch.testing.assert_close(model(x), expected)
    assert ciphertune.share(model).outsourced == 8 * 6 + 6 * 4
    assert ciphertune.share(model).layers == 2
    with ciphertune.in_the_clear(model):
        torch.testing.assert_close(model(x), expected)
    ciphertune.restore(model)
    assert isinstance(model[0], OutsourcedLinear)
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), expected)
