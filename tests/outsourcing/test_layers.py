"""Which layers are found, which can be outsourced, and which of them a caller means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import ciphertune
from ciphertune.errors import NothingOutsourcedError, UnknownLayerError, UnsupportedLayerError
from ciphertune.outsourcing.layers import Candidate, choose_layers, device_of, linear_layers, sibling_groups
from ciphertune.plugins.manager import PluginManager

Tiny = Callable[[str], nn.Module]


def names(model: nn.Module, choice: Any = None) -> list[str]:
    return [candidate.name for candidate in choose_layers(model, choice, PluginManager())]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = Conv1D(6, 4)
        self.top = nn.Linear(6, 2)


ALL = ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj", "conv", "top"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ALL),
        ("all", ALL),
        ("blocks.1.q_proj", ["blocks.1.q_proj"]),
        ("q_proj", ["blocks.0.q_proj", "blocks.1.q_proj"]),
        ("1.q_proj", ["blocks.1.q_proj"]),
        ("blocks.*", ALL[:4]),
        ("*.0.*", ALL[:2]),
        ("*", ALL),
        (["top", "blocks.0.q_proj"], ["blocks.0.q_proj", "top"]),
        (["top", "top", "t*"], ["top"]),
        ({"conv"}, ["conv"]),
        (iter(["conv", "v_proj"]), ["blocks.0.v_proj", "blocks.1.v_proj", "conv"]),
        (Conv1D, ["conv"]),
        (nn.Linear, [*ALL[:4], "top"]),
        ([Conv1D, "top"], ["conv", "top"]),
        (nn.Module, ALL),
        (lambda name, module: module.weight.shape == (2, 6), ["top"]),
        ([lambda name, module: name.startswith("blocks.0"), "conv"], [*ALL[:2], "conv"]),
    ],
)
def test_choices(choice: Any, expected: list[str]) -> None:
    assert names(Net(), choice) == expected


@pytest.mark.parametrize(
    ("choice", "known"),
    [
        ("q_prjo", "did you mean 'q_proj'"),
        ("proj", "q_proj"),
        ("blocks.2.q_proj", "Known: conv, q_proj, top, v_proj"),
        ("blocks.0.norm", "Known"),
        ("x*", "Known"),
        (["top", "tpo"], "did you mean 'top'"),
    ],
)
def test_names_that_match_nothing(choice: Any, known: str) -> None:
    with pytest.raises(UnknownLayerError, match="no linear layer matches") as caught:
        names(Net(), choice)
    assert known in str(caught.value)


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        (nn.Sequential(nn.ReLU()), None),
        (nn.ReLU(), None),
        (nn.Linear(3, 3), None),  # the model itself hangs nowhere, so nothing can take its place
        (Net(), []),
        (Net(), nn.Conv2d),
        (Net(), lambda name, module: False),
    ],
)
def test_nothing_left(model: nn.Module, choice: Any) -> None:
    with pytest.raises(NothingOutsourcedError) as caught:
        names(model, choice)
    assert "None" not in str(caught.value)


def test_nothing_left_says_why() -> None:
    model = Net()
    for module in (model.conv, model.top):
        module.requires_grad_(False)
    with pytest.raises(NothingOutsourcedError, match=r"blocks.0.q_proj: its weight is being trained"):
        names(model, "blocks*")


class Int8Linear(nn.Linear):
    """Stands for a quantized linear layer of another library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 100).round() / 100, self.bias)


class IntegerWeight(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)


def awkward() -> nn.Module:
    model = nn.Module()
    model.fine = nn.Linear(4, 4).requires_grad_(False)
    model.quantized = Int8Linear(4, 4)
    model.attention = nn.MultiheadAttention(4, 2)
    model.bare_attention = nn.MultiheadAttention(4, 2)
    model.bare_attention.out_proj = nn.Linear(4, 4)  # type: ignore[assignment]
    model.meta = nn.Linear(4, 4, device="meta")
    model.integer = nn.Linear(2, 2)
    model.integer.weight = IntegerWeight().weight
    model.eighth = nn.Linear(4, 4).requires_grad_(False).to(torch.float8_e4m3fn)
    model.trained = nn.Linear(4, 4)
    model.empty = nn.Linear(4, 4).requires_grad_(False)
    model.empty.weight = nn.Parameter(torch.empty(0, 4), requires_grad=False)
    return model


def test_validate_names_each_layer_and_its_reason() -> None:
    reasons = ciphertune.validate(awkward())
    expected = {
        "quantized": "Int8Linear is a linear layer with a behaviour of its own",
        "attention.out_proj": "nn.MultiheadAttention computes with its weights directly",
        "bare_attention.out_proj": "nn.MultiheadAttention computes with its weights directly",
        "meta": "meta device",
        "integer": "torch.int8",
        "eighth": "torch.float8_e4m3fn",
        "trained": "being trained",
        "empty": "empty",
    }
    assert reasons.keys() == expected.keys()
    for name, text in expected.items():
        assert text in reasons[name], name
    assert ciphertune.validate(Net()) == {}


def test_obstacles_are_errors_when_named_and_skipped_by_patterns() -> None:
    with pytest.warns(
        UserWarning, match=r"56% of the weights of .* integer: its weight has dtype torch.int8; eighth: "
    ):
        assert names(awkward()) == ["fine"]
    assert names(awkward(), "all") == ["fine"]
    assert names(awkward(), "*") == ["fine"]
    assert names(awkward(), nn.Linear) == ["fine"]
    for name in ciphertune.validate(awkward()):
        with pytest.raises(UnsupportedLayerError, match=f"^{name} cannot be outsourced: "):
            names(awkward(), ["fine", name])


def test_wholly_trainable_and_wholly_frozen_models_are_outsourced() -> None:
    # Nothing says yet what will be trained: adapters come later.
    assert names(Net()) == ALL
    assert names(Net().requires_grad_(False)) == ALL


def test_trained_layers_stay() -> None:
    model = Net().requires_grad_(False)
    model.top.requires_grad_(True)
    assert names(model) == ALL[:-1]
    assert names(model, "all") == ALL[:-1]
    with pytest.raises(UnsupportedLayerError, match="top cannot be outsourced: its weight is being trained"):
        names(model, "top")
    model.top.weight.requires_grad_(False)  # the bias stays here anyway, so it may be trained
    assert names(model) == ALL


def test_tied_weights_stay_unless_named() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(5, 4)
    model.head = nn.Linear(4, 5, bias=False)
    model.free = nn.Linear(4, 5)
    model.head.weight = model.embedding.weight
    assert names(model) == ["free"]
    assert names(model, "head") == ["head"]
    assert names(model, "all") == ["head", "free"]


def test_layers_of_transformers_models(tiny: Tiny) -> None:
    gpt2 = [
        f"transformer.h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert names(tiny("gpt2")) == gpt2
    assert names(tiny("gpt2"), "all") == [*gpt2, "lm_head"]
    parts = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert names(tiny("llama")) == [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    assert names(tiny("llama"), "lm_head") == ["lm_head"]
    bert = names(tiny("bert"))
    assert len(bert) == 2 * 6 + 1
    assert bert[-1] == "bert.pooler.dense"
    assert names(tiny("bert"), "all")[-1] == "classifier"


def test_one_module_in_several_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared, nn.ReLU())})
    assert names(model) == ["a", "b", "c.0"]


def candidates(*paths: str) -> list[Candidate]:
    return [Candidate(path, nn.Module(), "x", nn.Linear(1, 1), None, None) for path in paths]


def test_siblings() -> None:
    found = candidates(
        "l.0.q_proj", "l.0.k_proj", "l.0.o_proj", "l.0.v_proj", "l.1.q_proj", "l.1.v_proj", "up_proj", "w3"
    )
    assert sibling_groups(found, [0] * 8) == [(0, 1, 3), (2,), (4, 5), (6,), (7,)]
    # Only layers of one input size and weight format can be stacked.
    assert sibling_groups(found, [0, 1, 0, 0, 0, 1, 0, 0]) == [(0, 3), (1,), (2,), (4,), (5,), (6,), (7,)]


def test_siblings_of_transformers_models(tiny: Tiny) -> None:
    for name, expected in [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]] * 2),
    ]:
        chosen = choose_layers(tiny(name), None, PluginManager())
        groups = sibling_groups(chosen, [tuple(c.weight().shape)[1] for c in chosen])
        assert [[chosen[i].attribute for i in group] for group in groups] == expected


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.", "b.", "a.b.", ""]), st.sampled_from(["q", "k", "v", "w1", "w3", "q_proj", "z"])
        ),
        unique=True,
        max_size=12,
    ),
    st.data(),
)
def test_every_layer_is_in_exactly_one_group(places: list[tuple[str, str]], data: Any) -> None:
    found = candidates(*(prefix + name for prefix, name in places))
    formats = [data.draw(st.integers(0, 1)) for _ in found]
    groups = sibling_groups(found, formats)
    assert sorted(i for group in groups for i in group) == list(range(len(found)))
    for group in groups:
        assert len({formats[i] for i in group}) == 1
        assert len({found[i].name.rpartition(".")[0] for i in group}) == 1


def test_conv1d_weights_are_turned() -> None:
    model = Net()
    by_name = {candidate.name: candidate for candidate in linear_layers(model)}
    assert by_name["conv"].weight().shape == (6, 4)
    assert torch.equal(by_name["conv"].weight(), model.conv.weight.t())
    assert torch.equal(by_name["top"].weight(), model.top.weight)


def test_layers_on_several_devices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert device_of(linear_layers(model)[:1]) == torch.device("cpu")
    with pytest.raises(UnsupportedLayerError, match=r"several devices \(cpu, meta\)"):
        device_of(linear_layers(model))
