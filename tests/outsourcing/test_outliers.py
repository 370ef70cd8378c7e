"""Channels with outliers: which they are, and products whose client multiplies them itself."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny as models
import torch
from farm import Farm
from torch import Tensor, nn

import ciphertune
from ciphertune.errors import ConfigError, InputError
from ciphertune.outsourcing.calibration import Calibration, calibration_of

OUTLIERS = (3, 40)


class Block(nn.Module):
    """Siblings that read an input with two outliers, and a layer whose output's gradient has one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(64, 130)
        self.k_proj = nn.Linear(64, 70, bias=False)
        self.last = nn.Linear(200, 90)
        self.strength = torch.ones(90)
        self.strength[7] = 1000.0

    def forward(self, x: Tensor, apart: bool = False) -> Any:
        other = x.clone() if apart else x
        y = self.last(torch.cat([self.q_proj(x), self.k_proj(other)], dim=-1).tanh())
        return types.SimpleNamespace(y=y, loss=(y * self.strength).square().mean())


def data(tokens: int, seed: int = 1, outlier: float = 1000.0) -> Tensor:
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))
    x[:, list(OUTLIERS)] *= outlier
    return x


def calibrated(model: nn.Module | None = None) -> Calibration:
    found: Calibration = ciphertune.calibrate(model or Block(), [data(100, seed=9)])
    return found


def kept(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    layers = ciphertune.outsourced_layers(model)
    found = {layer.name: layer.info.kept for layer in layers}
    return {name: ([], []) if k is None else (k.inputs.tolist(), k.outputs.tolist()) for name, k in found.items()}


@pytest.fixture
def outsourced() -> Iterator[Callable[..., Any]]:
    made = []

    def make(to: str, calibration: Calibration | None = None) -> Any:
        model = ciphertune.outsource(Block(), to, ["q_proj", "k_proj", "last"], calibration=calibration)
        made.append(ciphertune.session_of(model))
        return model

    yield make
    for session in made:
        session.close()


def test_only_what_lies_far_above_the_others_is_kept(outsourced: Callable[..., Any]) -> None:
    model = outsourced("simulation", calibrated())
    channels = kept(model)
    assert channels["q_proj"][0] == channels["k_proj"][0] == list(OUTLIERS)
    assert channels["last"] == ([], [7])


def test_the_largest_are_kept_where_there_are_many() -> None:
    size = torch.ones(64, dtype=torch.float64)
    size[10:30] = torch.arange(100, 120, dtype=torch.float64)
    calibration = Calibration({"0": size.square()}, {})
    model = ciphertune.outsource(nn.Sequential(nn.Linear(64, 8)), "simulation", calibration=calibration)
    assert kept(model)["0"] == (list(range(22, 30)), [])


def errors(model: Any, apart: bool = False) -> tuple[float, float]:
    """Relative errors of the output and of the input's gradient, by the part that the common channels have in them."""
    x = data(50)
    rest = x.clone()
    rest[:, list(OUTLIERS)] = 0
    found, exact = [], []
    for each, results in ((model, found), (Block(), exact)):
        q = each.q_proj(x)
        k = each.k_proj(x.clone() if apart else x)
        h = torch.linspace(-1, 1, 50 * 200).view(50, 200).requires_grad_()
        (each.last(h) * each.strength).sum().backward()
        results += [torch.cat([q, k], dim=1).detach(), h.grad]
    plain = Block()
    signal = torch.cat([plain.q_proj(rest), plain.k_proj(rest)], dim=1).detach()
    common = plain.last.weight.detach()[torch.arange(90) != 7].sum(0)
    return (
        float((found[0] - exact[0]).norm() / signal.norm()),
        float((found[1] - exact[1]).norm() / common.expand(50, -1).norm()),
    )


@pytest.mark.parametrize("apart", [False, True], ids=["together", "alone"])
@pytest.mark.parametrize("to", ["mlwe", "simulation"])
def test_the_others_keep_their_precision(outsourced: Callable[..., Any], to: str, apart: bool) -> None:
    before = errors(outsourced(to), apart)
    after = errors(outsourced(to, calibrated()), apart)
    assert min(before) > 0.1
    assert max(after) < 0.02


def test_nothing_is_kept_of_weights_in_float32(outsourced: Callable[..., Any]) -> None:
    assert not any(inputs or outputs for inputs, outputs in kept(outsourced("clear", calibrated())).values())


def test_what_is_sent_has_zeros_for_them_and_the_same_length(
    outsourced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, list[Tensor]] = {"forward": [], "backward": []}
    product = ciphertune.Session.product

    def recorded(session: Any, group: int, direction: Any, x: Tensor, *owners: Any, **known: Any) -> Tensor:
        sent[direction].append(x)
        return product(session, group, direction, x, *owners, **known)

    monkeypatch.setattr(ciphertune.Session, "product", recorded)
    counted = []
    for calibration in (None, calibrated()):
        model = outsourced("mlwe", calibration)
        x = data(50).requires_grad_()
        model(x).loss.backward()
        traffic = ciphertune.session_of(model).traffic
        counted.append((traffic.bytes_up, traffic.bytes_down))
    assert counted[0] == counted[1]
    shapes = [[each.shape for each in sent[direction]] for direction in sent]
    assert all(found[:2] == found[2:] for found in shapes)
    group, last = sent["forward"][2:]
    assert group.eq(0).all(0).nonzero().flatten().tolist() == list(OUTLIERS)
    assert not last.eq(0).all(0).any()
    assert sent["backward"][2].eq(0).all(0).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("to", ["mlwe", "simulation"])
def test_over_two_workers(farm: Farm, to: str) -> None:
    farm.plant(
        Block(),
        to,
        one=[[("q_proj", 0, 64), ("k_proj", 0, 64)], [("last", 0, 64)]],
        two=[[("q_proj", 64, None), ("k_proj", 64, None)], [("last", 64, None)]],
    )
    model = Block()
    calibration = calibrated()
    session = farm.outsource(model, to, calibration=calibration)
    assert max(errors(model)) < 0.02
    assert max(errors(model, apart=True)) < 0.02
    assert session.traffic.retries == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(outsourced: Callable[..., Any], value: float) -> None:
    model = outsourced("simulation", calibrated())
    x = data(5)
    x[2, OUTLIERS[0]] = value
    assert model.q_proj(x).isnan().any(1).tolist() == [False, False, True, False, False]
    gradient = torch.ones(5, 90)
    gradient[1, 7] = value
    h = torch.randn(5, 200, requires_grad=True)
    with pytest.raises(InputError, match="1 of 450 values"):
        model.last(h).backward(gradient)


def test_gradients_of_float16_that_overflow(outsourced: Callable[..., Any]) -> None:
    model = outsourced("simulation", calibrated())
    h = torch.randn(5, 200).half().requires_grad_()
    gradient = torch.ones(5, 90).half()
    gradient[1, 7] = torch.inf
    model.last(h).backward(gradient)
    assert h.grad is not None
    assert h.grad.isnan().any(1).tolist() == [False, True, False, False, False]


def test_gradients_of_gradients(outsourced: Callable[..., Any]) -> None:
    found = []
    for model in (outsourced("mlwe", calibrated()), Block()):
        x = data(20, outlier=30.0).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).y.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append(x.grad)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.03


@pytest.mark.parametrize("mode", ["none", "no_grad", "inference", "autocast"])
def test_calibrating_changes_nothing_and_minds_no_mode(mode: str) -> None:
    model = Block().train()
    model.k_proj.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    expected = calibrated()
    modes = {
        "none": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    state = torch.get_rng_state()
    with modes[mode]():
        found = calibrated(model)
    assert torch.equal(state, torch.get_rng_state())
    for name in ("q_proj", "k_proj", "last"):
        torch.testing.assert_close(found.inputs[name], expected.inputs[name])
        torch.testing.assert_close(found.outputs[name], expected.outputs[name])
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = Block().train()
    with pytest.raises(RuntimeError):
        ciphertune.calibrate(model, [torch.ones(2, 3)])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_wrong_calls(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="at least one batch"):
        ciphertune.calibrate(Block(), [])
    with pytest.raises(ConfigError, match="before adding them"):
        ciphertune.calibrate(peft.get_peft_model(Block(), peft.LoraConfig(target_modules=["last"])), [data(3)])
    models.save_letters(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "letters.txt").write_text("the quick brown fox")
    for name, content, message in (("none.txt", None, "cannot read"), ("bad.txt", b"\xff\xfe\xff", "UTF-8")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            ciphertune.public_batches(tokenizer, tmp_path / name)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="no tokens"):
        ciphertune.public_batches(tokenizer, tmp_path / "empty.txt")
    assert calibration_of(Block(), tokenizer, None)[0] is None
    with pytest.raises(ConfigError, match="cannot be calibrated"):
        calibration_of(Block(), tokenizer, tmp_path / "letters.txt")
