"""Outsourcing models: what is replaced, that results are right, and how to undo it."""

import copy
from typing import Any

import pytest
import torch
from helpers import Attention, block, gradients, recorded, relative
from torch import nn

import ciphertune
from ciphertune.errors import (
    LayerError,
    NothingOutsourcedError,
    OutsourcedWeightError,
    PluginError,
    SecurityError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from ciphertune.layers import linear_layers
from ciphertune.linear import OutsourcedLinear
from ciphertune.plugins import PluginManager
from ciphertune.weights import quantize

BACKENDS = {"clear": 1e-6, "simulation": 2e-2, "mlwe": 2e-2, "mlwe?weight_bits=16": 1e-3, "mlwe+local://?wire=1": 2e-2}


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in ciphertune.outsourced_layers(model)]


@pytest.mark.parametrize(("to", "tolerance"), BACKENDS.items())
def test_outputs_and_gradients_are_those_of_the_original(to: str, tolerance: float) -> None:
    model, x = block(), torch.randn(3, 7, 16)
    want_y, want_g = gradients(copy.deepcopy(model), x)
    y, g = gradients(ciphertune.outsource(model, to), x)
    assert relative(y, want_y) < tolerance
    assert relative(g, want_g) < tolerance
    assert (relative(y, want_y) == 0) == (to == "clear")


@pytest.mark.parametrize("bits", [8, 16])
def test_quantization_alone_is_what_a_hand_quantized_model_gives(bits: int) -> None:
    model, x = block(), torch.randn(2, 16)
    by_hand = copy.deepcopy(model)
    for module in by_hand.modules():
        if isinstance(module, nn.Linear):
            top = {8: 127, 16: 127 * 257}[bits]
            scale = module.weight.detach().abs().amax(1, keepdim=True) / top
            module.weight.data = (module.weight.data / scale).round() * scale
    want_y, want_g = gradients(by_hand, x)
    y, g = gradients(ciphertune.outsource(model, f"clear?weight_bits={bits}"), x)
    assert relative(y, want_y) < 1e-5
    assert relative(g, want_g) < 1e-5


def test_quantization_of_zero_and_tiny_rows() -> None:
    weight = torch.randn(4, 6)
    weight[1], weight[2] = 0, 1e-40
    held = quantize(weight, 8)
    assert held.codes.dtype == torch.int8
    assert (held.codes[1] == 0).all()
    assert (held.dequantize() - weight).abs().amax(1)[[0, 3]].max() <= (weight.abs().amax(1) / 127 / 2).max() * 1.001
    assert torch.isfinite(held.dequantize()).all()
    with pytest.raises(UnsupportedLayerError, match="NaN or infinity"):
        quantize(torch.full((2, 2), torch.nan), 8)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ["0", "1.q_proj", "1.k_proj", "1.v_proj", "1.o_proj", "2"]),
        ("all", ["0", "1.q_proj", "1.k_proj", "1.v_proj", "1.o_proj", "2"]),
        ("q_proj", ["1.q_proj"]),
        (["1.v_proj", "0"], ["0", "1.v_proj"]),
        ("1.*", ["1.q_proj", "1.k_proj", "1.v_proj", "1.o_proj"]),
        (nn.Linear, ["0", "1.q_proj", "1.k_proj", "1.v_proj", "1.o_proj", "2"]),
        (lambda name, module: module.out_features == 12, ["1.k_proj", "1.v_proj"]),
        ([lambda name, module: name == "2", "q_proj"], ["1.q_proj", "2"]),
    ],
)
def test_layers_are_chosen_by_name_ending_pattern_type_or_predicate(choice: Any, expected: list[str]) -> None:
    assert names(ciphertune.outsource(block(), "clear", choice)) == expected


def test_a_plugin_chooses_when_the_caller_does_not() -> None:
    class Chooser:
        @ciphertune.hookimpl
        def ciphertune_select_layers(self, model: nn.Module, candidates: list[str]) -> list[str]:
            return [name for name in candidates if name.endswith("o_proj")]

    manager = PluginManager()
    manager.register(Chooser())
    assert names(ciphertune.outsource(block(), "clear", plugins=manager)) == ["1.o_proj"]
    assert names(ciphertune.outsource(block(), "clear", "2", plugins=manager)) == ["2"]


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ("q_prj", UnknownLayerError, "did you mean 'q_proj'"),
        (["q_proj", "9"], UnknownLayerError, "'9'"),
        ("*.nothing*", UnknownLayerError, "nothing"),
        ([], NothingOutsourcedError, "no layer is left"),
        (nn.Conv2d, NothingOutsourcedError, "no layer is left"),
    ],
)
def test_choices_that_leave_nothing(choice: Any, error: type[LayerError], message: str) -> None:
    model = block()
    with pytest.raises(error, match=message):
        ciphertune.outsource(model, "clear", choice)
    assert names(model) == []


class Odd(nn.Linear):
    """A linear layer with a behaviour of its own, as quantization libraries have them."""


def test_layers_that_cannot_be_outsourced_are_listed_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "odd": Odd(4, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "meta": nn.Linear(4, 4, device="meta"),
            "trained": nn.Linear(4, 4),
            "fine": nn.Linear(4, 4),
        }
    ).requires_grad_(False)
    model["trained"].requires_grad_(True)
    reasons = ciphertune.validate(model)
    assert set(reasons) == {"odd", "attention.out_proj", "meta", "trained"}
    assert "behaviour of its own" in reasons["odd"]
    assert "meta device" in reasons["meta"]
    assert "being trained" in reasons["trained"]
    for name in reasons:
        with pytest.raises(UnsupportedLayerError, match=name):
            ciphertune.outsource(model, "clear", name)
    assert names(ciphertune.outsource(model, "clear")) == ["fine"]


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(NothingOutsourcedError, match="no nn.Linear or Conv1D"):
        ciphertune.outsource(nn.Sequential(nn.ReLU()), "clear")
    with pytest.raises(NothingOutsourcedError, match="call ciphertune.outsource"):
        ciphertune.session_of(block())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = block()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedLayerError, match="NaN or infinity"):
        ciphertune.outsource(model, "mlwe")
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_outsourcing_twice_takes_only_what_is_left() -> None:
    model = ciphertune.outsource(block(), "clear", "0")
    ciphertune.outsource(model, "clear", "2")
    assert names(model) == ["0", "2"]
    assert {c.name for c in linear_layers(model)} == {"1.q_proj", "1.k_proj", "1.v_proj", "1.o_proj"}


def test_restore_is_the_inverse() -> None:
    model, x = block(), torch.randn(3, 16)
    original = copy.deepcopy(model)
    session = ciphertune.session_of(ciphertune.outsource(model, "clear"))
    ciphertune.restore(model)
    assert names(model) == []
    assert session.closed
    assert torch.equal(model(x), original(x))
    assert list(model.state_dict()) == list(original.state_dict())
    rounded = ciphertune.restore(ciphertune.outsource(copy.deepcopy(original), "mlwe"))
    assert 0 < relative(rounded(x), original(x)) < 2e-2
    with pytest.raises(NothingOutsourcedError):
        ciphertune.restore(model)


def test_shares_count_what_is_where() -> None:
    model = block()
    total = sum(p.numel() for p in model.parameters())
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    counted = ciphertune.share(ciphertune.outsource(model, "clear"))
    assert (counted.outsourced, counted.at_client, counted.layers) == (weights, total - weights, 6)
    assert counted.fraction == weights / total


def test_no_backward_product_before_the_first_trainable_parameter() -> None:
    manager, recorder = recorded()
    model = block().requires_grad_(False)
    model[2].requires_grad_(True)
    ciphertune.outsource(model, "clear", plugins=manager)
    model(torch.randn(3, 16)).sum().backward()
    assert recorder.layers("forward") == [("0",), ("1.q_proj", "1.k_proj", "1.v_proj"), ("1.o_proj",)]
    assert recorder.count("backward") == 0

    manager, recorder = recorded()
    model = block().requires_grad_(False)
    ciphertune.outsource(model, "clear", plugins=manager)
    model[1].q_proj.bias.requires_grad_(True)
    model(torch.randn(3, 16)).sum().backward()
    assert recorder.layers("backward") == [("2",), ("1.o_proj",)]


def test_biases_stay_and_can_be_trained() -> None:
    model, x = block(), torch.randn(3, 16)
    original = copy.deepcopy(model)
    ciphertune.outsource(model, "clear")
    model(x).square().sum().backward()
    original(x).square().sum().backward()
    biases = {n: p for n, p in original.named_parameters() if n.endswith("bias")}
    assert {n for n, _ in model.named_parameters()} == set(biases)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, biases[name].grad)


def test_a_whole_model_is_not_pickled(tmp_path: Any) -> None:
    model = ciphertune.outsource(block(), "clear")
    with pytest.raises(OutsourcedWeightError):
        torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(name.endswith("bias") for name in state)
    assert not model.load_state_dict(state).missing_keys


def test_deep_copies_share_the_session() -> None:
    model, x = ciphertune.outsource(block(), "clear"), torch.randn(2, 16)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    assert ciphertune.session_of(twin) is ciphertune.session_of(model)


def test_data_parallel_is_refused() -> None:
    model = ciphertune.outsource(block(), "clear")
    with pytest.raises(OutsourcedWeightError, match="DataParallel"):
        model[0]._replicate_for_data_parallel()


class FakeRemote:
    """A transport that claims to leave the process."""

    from ciphertune_local import LocalOptions as Options

    remote = True
    name = "remote"

    def __init__(self, options: Any = None) -> None:
        pass


def test_what_does_not_encrypt_needs_leave_to_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from ciphertune import registry
    from ciphertune.session import choose

    load = registry.load
    monkeypatch.setattr(registry, "load", lambda group, name: FakeRemote if name == "remote" else load(group, name))
    for backend in ("clear", "simulation"):
        with pytest.raises(SecurityError, match="allow_insecure=1"):
            choose(f"{backend}+remote://host:1")
        assert choose(f"{backend}+remote://host:1?allow_insecure=1").options.allow_insecure
    assert not choose("mlwe+remote://host:1").options.allow_insecure


def test_sessions_that_are_closed_and_plugins_that_veto() -> None:
    model, x = ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "mlwe"), torch.randn(2, 4)
    session = ciphertune.session_of(model)
    session.close()
    session.close()
    with pytest.raises(SecurityError, match="closed"):
        model(x)

    class Gate:
        @ciphertune.hookimpl
        def ciphertune_before_request(self, exchange: Any) -> None:
            raise ciphertune.VetoError(f"no requests at night: {exchange.layers}")

    manager, recorder = recorded()
    manager.register(Gate())
    model = ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "clear", plugins=manager)
    with pytest.raises(ciphertune.VetoError, match="at night"):
        model(x)
    assert recorder.exchanges == []
    assert ciphertune.session_of(model).traffic.requests == 0


def test_observers_that_raise_are_named_and_stop_nothing() -> None:
    class Faulty:
        @ciphertune.hookimpl
        def ciphertune_after_reply(self, exchange: Any) -> None:
            raise RuntimeError("disk full")

    manager, recorder = recorded()
    manager.register(Faulty(), "faulty")
    model = ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "clear", plugins=manager)
    with pytest.warns(RuntimeWarning, match="'faulty' failed in ciphertune_after_reply: RuntimeError: disk full"):
        model(torch.randn(2, 4))
    assert len(recorder.exchanges) == 1

    class Misspelt:
        @ciphertune.hookimpl
        def ciphertune_after_replies(self, exchange: Any) -> None:
            pass

    with pytest.raises(PluginError, match="ciphertune_after_replies"):
        manager.register(Misspelt(), "misspelt")
    assert "misspelt" not in manager.names()


def test_the_session_counts_every_byte() -> None:
    manager, recorder = recorded()
    model = ciphertune.outsource(Attention(), "mlwe", plugins=manager)
    model(torch.randn(3, 5, 24)).sum().backward()
    traffic = ciphertune.session_of(model).traffic
    assert traffic.requests == len(recorder.exchanges) == 3
    assert traffic.bytes_up == sum(e.bytes_up for e in recorder.exchanges)
    first = recorder.exchanges[0]
    assert (first.tokens, first.bytes_up, first.bytes_down) == (15, 24 * 4 * 15 + 32, 48 * 3 * (1280 + 15))
    assert traffic.wait_seconds >= traffic.evaluate_seconds > 0
    assert isinstance(model.q_proj, OutsourcedLinear)
