"""Answers that are no exact integers: held against what was asked for once they are decrypted, with new keys after."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Farm, Host
from torch import nn

import ciphertune
from ciphertune.backend import FLOAT32_ROUNDING, Backend, LinearMap, NoiseModel
from ciphertune.client.choice import choose
from ciphertune.client.noise_checks import DEVIATIONS, VECTORS, NoiseChecks, _weight
from ciphertune.errors import WeightsError, WrongReplyError
from ciphertune.protocol import Message
from ciphertune.weights import LayerWeight, describe, group_map, quantize
from ciphertune_simulation import SimulationBackend, SimulationWorker

CPU = torch.device("cpu")
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
WHOLE: Any = [["0"], ["2"]]
UPPER: Any = [[("0", 0, 64)], [("2", 0, None)]]
LOWER: Any = [[("0", 64, None)]]


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 9))


def lying(host: Host, by: float = 0.3, value: float | None = None) -> None:
    def lie(request: Message) -> Message:
        reply = host.answer(request)
        y = reply.buffers["y"] = reply.buffers["y"].clone()
        y[-1] = y[-1] * (1 + by) if value is None else value
        return reply

    host.on("evaluate", lie, always=True)


def step(outsourced: nn.Module) -> torch.Tensor:
    x = X.clone().requires_grad_()
    outsourced(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("backend", ["clear", "simulation", "simulation?weight_bits=16"])
@pytest.mark.parametrize("plan", [{"one": WHOLE}, {"one": UPPER, "two": LOWER}])
def test_honest_workers_pass(farm: Farm, backend: str, plan: dict[str, Any]) -> None:
    name, _, option = backend.partition("?weight_bits=")
    farm.plant(model(), backend, **plan)
    outsourced = model()
    options: dict[str, Any] = {"weight_bits": option} if option else {}
    session = farm.outsource(outsourced, name, **options)
    assert session.checked == "after decryption"
    for _ in range(5):
        found = step(outsourced)
    expected = step(model())
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert session.pool.wrong == []


@pytest.mark.parametrize("liar", ["one", "two"])
@pytest.mark.parametrize("backend", ["clear", "simulation"])
def test_the_liar_among_pieces_is_named_in_both_directions(farm: Farm, backend: str, liar: str) -> None:
    farm.plant(model(), backend, one=UPPER, two=LOWER)
    outsourced = model()
    session = farm.outsource(outsourced, backend)
    y = outsourced(X.clone().requires_grad_())
    lying(farm.hosts[liar])
    with pytest.raises(WrongReplyError, match=f"{liar}: .* no other worker holds these rows"):
        y.sum().backward()
    assert [each.worker for each in session.pool.wrong] == [liar]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_no_value_passes_for_being_none(farm: Farm, value: float) -> None:
    """NaN among decrypted values is looked for by the check, and not before."""
    (one,) = farm.plant(model(), "simulation", one=WHOLE)
    lying(one, value=value)
    outsourced = model()
    farm.outsource(outsourced, "simulation")
    with pytest.raises(WrongReplyError):
        outsourced(X)


def test_a_replica_goes_on_with_new_keys(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that was encrypted under the old key is sent again."""
    one, two = farm.plant(model(), "simulation", one=WHOLE, two=WHOLE)
    outsourced = model()
    session = farm.outsource(outsourced, "simulation")
    made = []
    fresh = session.choice.backend.client
    session.choice.backend.renewed_client = lambda device: made.append(1) or fresh(device)  # type: ignore
    before = session._keys
    lying(one)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step(outsourced)
    assert made == [1]
    assert session._keys is not before
    assert "goes on with new keys" in caplog.text
    assert [each.worker for each in session.pool.wrong] == ["one"]
    assert one.count("evaluate") == 1
    assert two.count("evaluate") == 12, "that of the first too, encrypted anew"
    assert two.count("open") == 2
    assert session.traffic.retries == 1


def test_a_failure_with_nobody_left_ends_the_keys_too(farm: Farm) -> None:
    (one,) = farm.plant(model(), "simulation", one=WHOLE)
    outsourced = model()
    session = farm.outsource(outsourced, "simulation")
    before = session._keys
    lying(one)
    for _ in range(2):
        with pytest.raises(WrongReplyError, match="the last checkpoint|no worker is left"):
            outsourced(X)
    assert session._keys is not before
    assert one.count("evaluate") == 1


def test_without_codes_it_takes_an_option(farm: Farm, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ciphertune.split(model(), tmp_path, layers="all", weight_bits=8)
    (one,) = farm.plant(model(), "simulation", one=WHOLE)
    one.on("weights", lambda request: Message("error", {"code": "withheld", "message": "no"}), always=True)
    skeleton = model().to("meta")
    with pytest.raises(WeightsError, match="needed to check answers; check_answers=0 does without"):
        ciphertune.load_client(tmp_path / "client", farm.selection("simulation"), skeleton=skeleton)
    with caplog.at_level(logging.WARNING):
        loaded = ciphertune.load_client(
            tmp_path / "client", farm.selection("simulation", check_answers=0), skeleton=model().to("meta")
        )
    session = ciphertune.session_of(loaded)
    farm.sessions.append(session)
    assert session.checked == "no"
    assert "not checked (check_answers=0): a wrong one is believed" in caplog.text


def test_a_backend_without_a_bound_says_so(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SimulationBackend, "rounding", lambda self, linear_map: None)
    farm.plant(model(), "simulation", one=WHOLE)
    with caplog.at_level(logging.WARNING):
        session = farm.outsource(model(), "simulation")
    assert session.checked == "no"
    assert "simulation states no bound of its errors" in caplog.text


class Checked:
    """One weight with its vectors."""

    def __init__(self, backend: Backend, outputs: int, features: int) -> None:
        self.weight = quantize(torch.randn(outputs, features, generator=torch.Generator().manual_seed(3)), 8)
        self.backend = backend
        info = describe("layer", LayerWeight(self.weight.codes, self.weight.scale))
        self.map = group_map([info], "forward")
        self.checks = NoiseChecks(backend, CPU)
        preparation = self.checks.preparation(self.map, group_map([info], "backward"))
        assert preparation is not None
        preparation.absorb(0, self.weight.codes)
        preparation.finish()

    def passes(self, x: torch.Tensor, error: torch.Tensor) -> bool:
        exact = x.double() @ self.weight.codes.double().t()
        return self.checks.right(self.map, self.map, x, exact + error, self.map, x)


@pytest.mark.parametrize("tokens", [3, 40])
def test_what_lies_below_the_tolerance_passes_and_what_exceeds_it_is_found(tokens: int) -> None:
    """An error of a token passes up to about ten deviations of the declared one, all outputs together."""
    held = Checked(choose("simulation").backend, 96, 64)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(4))
    noise = held.backend.noise(held.map)
    assert noise is not None
    unit = noise.error_deviation(held.map.max_norm) / noise.token_scale(x, held.map)[:, None]
    direction = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction *= math.sqrt(96) * unit / direction.norm(dim=1, keepdim=True)
    assert all(held.passes(x, direction) for _ in range(50)), "as large as an honest error"
    assert not any(held.passes(x, 40 * direction) for _ in range(50))
    alone = torch.zeros(tokens, 96, dtype=torch.float64)
    alone[tokens // 2, 7] = float(unit[tokens // 2]) * math.sqrt(96) * 1.1 * DEVIATIONS
    assert not any(held.passes(x, alone) for _ in range(50)), "one value: every vector of ±1 sees it"


@pytest.mark.parametrize("outputs", [40, 130, 200])
def test_correlated_errors_weigh_as_a_simulation_draws_them(outputs: int) -> None:
    noise = NoiseModel(2.0**20, 0.0, 1.0, 1, 0.7, 64)
    generator = torch.Generator().manual_seed(6)
    drawn = math.sqrt(0.7) * SimulationWorker({"seed": 0}, CPU)._along(generator, 64, 20000, outputs).double()
    drawn += math.sqrt(0.3) * torch.randn(20000, outputs, generator=generator, dtype=torch.float64)
    left = torch.randint(0, 2, (VECTORS, outputs), generator=generator).double() * 2 - 1
    left[0] = 1
    measured = (drawn @ left.t()).var(dim=0)
    assert torch.allclose(measured, _weight(noise, left), rtol=0.08)


def test_magnitudes_of_inputs_make_no_false_alarm() -> None:
    held = Checked(choose("clear").backend, 24, 40)
    exact = LinearMap("any", "forward", 1, 1, 1.0)
    assert held.backend.rounding(exact) == FLOAT32_ROUNDING
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e25, 0.0):
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(7)) * scale
        y = x @ held.weight.codes.float().t()
        assert held.checks.right(held.map, held.map, x, y, held.map, x), scale
