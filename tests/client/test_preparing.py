"""Codes that a client reads before its first product: from workers, folders and its own model, none of them trusted."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Blocks, Farm, Host
from torch import nn

import ciphertune
from ciphertune.bundle.codes import FolderCodes
from ciphertune.client import preparing
from ciphertune.errors import ConfigError, QuotaError, WeightsError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.protocol import Message
from ciphertune.weights import DIGEST_ROWS, LARGEST_READING, LayerWeight, describe, quantize
from ciphertune.worker import SessionLimits, WeightStore, Worker
from ciphertune.worker.readings import Readings

# Each test reads the codes itself.
pytestmark = pytest.mark.usefixtures("empty_cache")

X = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))


class Siblings(nn.Module):
    """Two layers of one input and one after them, none with a number of rows that blocks divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj = nn.Linear(40, 200, bias=False)
        self.k_proj = nn.Linear(40, 70, bias=False)
        self.o_proj = nn.Linear(270, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1))
        return out


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    def split(**options: Any) -> Path:
        ciphertune.split(Siblings(), tmp_path / "bundle", layers="all", **options)
        return tmp_path / "bundle"

    return split


WHOLE: Blocks = [["q_proj", "k_proj"], ["o_proj"]]
ROWS: list[Blocks] = [
    [[("q_proj", 0, 128), ("k_proj", 0, 64)], [("o_proj", 0, None)]],
    [[("q_proj", 128, None), ("k_proj", 64, None)]],
]


def meta() -> nn.Module:
    with torch.device("meta"):
        return Siblings()


def load(farm: Farm, folder: Path, **options: Any) -> Any:
    """The client's model of a bundle, whose session the farm closes."""
    bits = options.pop("weight_bits", 8)
    to = farm.selection("mlwe", weight_bits=bits, **options.pop("selection", {}))
    model = ciphertune.load_client(folder / "client", to, skeleton=meta(), **options)
    farm.sessions.append(ciphertune.session_of(model))
    return model


def check(model: Any) -> None:
    with torch.no_grad():
        expected, found = Siblings()(X), model(X)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    x = X.clone().requires_grad_()
    plain = X.clone().requires_grad_()
    model(x).sum().backward()
    Siblings()(plain).sum().backward()
    assert x.grad is not None
    assert plain.grad is not None
    assert float((x.grad - plain.grad).norm() / plain.grad.norm()) < 0.02


@pytest.mark.parametrize("weight_bits", [8, 16])
def test_a_client_without_weights_reads_them_from_workers(farm: Farm, bundle: Any, weight_bits: int) -> None:
    folder = bundle(weight_bits=weight_bits)
    farm.plant(Siblings(), f"mlwe?weight_bits={weight_bits}", one=WHOLE)
    model = load(farm, folder, weight_bits=weight_bits)
    check(model)
    assert farm.hosts["one"].count("weights") == 3
    set_up = ciphertune.session_of(model).set_up
    codes = sum(layer.in_features * layer.out_features for layer in ciphertune.session_of(model).layers)
    assert (set_up.weights, set_up.bytes_down) == (codes, codes * weight_bits // 8)
    assert set_up.seconds > 0


def test_rows_are_read_where_they_lie(farm: Farm, bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_BLOCK_VALUES", 40 * DIGEST_ROWS)
    farm.plant(Siblings(), "mlwe", one=ROWS[0], two=ROWS[1])
    check(load(farm, bundle()))
    assert [farm.hosts[name].count("weights") for name in ("one", "two")] == [4, 3]


def test_a_model_in_hand_is_not_read_from_workers(farm: Farm) -> None:
    farm.plant(Siblings(), "mlwe", one=WHOLE)
    model = Siblings()
    farm.outsource(model, "mlwe")
    check(model)
    assert farm.hosts["one"].count("weights") == 0
    set_up = ciphertune.session_of(model).set_up
    assert set_up.weights > 0
    assert set_up.bytes_down == 0


def test_members_that_turn_out_to_differ_are_evaluated_alone(farm: Farm) -> None:
    farm.plant(Siblings(), "mlwe", one=ROWS[0], two=ROWS[1])
    model = Siblings()
    farm.outsource(model, "mlwe")
    x = X.clone().requires_grad_()
    y = model.q_proj(x * 2).sum() + model.k_proj(x * 3).square().sum() + model.q_proj(x).sum()
    y.backward()
    plain, p = Siblings(), X.clone().requires_grad_()
    (plain.q_proj(p * 2).sum() + plain.k_proj(p * 3).square().sum() + plain.q_proj(p).sum()).backward()
    assert x.grad is not None
    assert p.grad is not None
    assert float((x.grad - p.grad).norm() / p.grad.norm()) < 0.02


def lying(host: Host) -> None:
    """Codes that are one off."""

    def lie(request: Message) -> Message:
        reply = host.answer(request)
        reply.buffers["codes"] = reply.buffers["codes"].clone().add_(1)
        return reply

    host.on("weights", lie, always=True)


def test_a_replica_that_lies_is_left_out(farm: Farm, bundle: Any) -> None:
    one, two = farm.plant(Siblings(), "mlwe", one=WHOLE, two=WHOLE)
    lying(one)
    check(load(farm, bundle()))
    assert two.count("weights") == 3
    two.script = two.answer


OTHERS: dict[str, Callable[[torch.Tensor, Host], torch.Tensor]] = {
    "other rows": lambda codes, host: codes.roll(1, 0),
    "another layer": lambda codes, host: host.held.rows("q_proj", 0, len(codes)),
    "a row less": lambda codes, host: codes[1:],
    "a row more": lambda codes, host: torch.cat([codes, codes[:1]]),
    "a column less": lambda codes, host: codes[:, 1:].contiguous(),
    "16 bits": lambda codes, host: codes.to(torch.int16),
    "one dimension": lambda codes, host: codes.flatten(),
}


@pytest.mark.parametrize("replica", [True, False])
@pytest.mark.parametrize("how", OTHERS)
def test_blocks_that_are_not_what_was_asked_for(farm: Farm, bundle: Any, how: str, replica: bool) -> None:
    """A replica takes over; without one nothing is prepared and the session is closed."""
    one, *_ = farm.plant(Siblings(), "mlwe", **dict.fromkeys(["one", "two"] if replica else ["one"], WHOLE))

    def other(request: Message) -> Message:
        reply = one.answer(request)
        if request.fields["layer"] == "k_proj":
            reply.buffers["codes"] = OTHERS[how](reply.buffers["codes"], one)
        return reply

    one.on("weights", other, always=True)
    if replica:
        check(load(farm, bundle()))
    else:
        with pytest.raises(WeightsError, match="k_proj"):
            load(farm, bundle())
        assert one.count("close") == 1
    one.script = one.answer


def test_the_only_worker_stops_half_way(farm: Farm, bundle: Any) -> None:
    folder = bundle()
    (one,) = farm.plant(Siblings(), "mlwe", one=WHOLE)
    one.on("weights", one.answer, one.crash)
    with pytest.raises(WeightsError, match=r"k_proj could not be read.*lost|k_proj could not be read.*nothing"):
        load(farm, folder, selection={"deadline": 0.5})
    one.restart()
    one.script = one.answer
    check(load(farm, folder))


def test_where_all_lie_nothing_is_prepared(farm: Farm, bundle: Any) -> None:
    (one,) = farm.plant(Siblings(), "mlwe", one=WHOLE)
    lying(one)
    with pytest.raises(WeightsError, match=r"q_proj: rows 0 to 200 are not those of this model"):
        load(farm, bundle())
    assert one.count("close") == 1, "the session was left open"


def test_a_worker_that_dies_half_way_is_replaced(farm: Farm, bundle: Any) -> None:
    one, _ = farm.plant(Siblings(), "mlwe", one=WHOLE, two=WHOLE)
    one.on("weights", one.answer, one.crash)
    check(load(farm, bundle()))


def test_workers_that_answer_without_codes(farm: Farm, bundle: Any) -> None:
    (one,) = farm.plant(Siblings(), "mlwe", one=WHOLE)
    one.on("weights", lambda request: Message("ok"), always=True)
    with pytest.raises(ciphertune.CipherTuneError, match="without them"):
        load(farm, bundle())


def test_weights_that_are_withheld(farm: Farm, bundle: Any) -> None:
    folder = bundle()
    (one,) = farm.plant(Siblings(), "mlwe", one=WHOLE)
    one.worker = Worker(one.held, limits=SessionLimits(readings=0))
    with pytest.raises(WeightsError, match=r"one does not let its weights be read.*weights=PATH"):
        load(farm, folder)
    check(load(farm, folder, weights=folder / "worker"))


def test_a_backend_that_prepares_nothing_reads_nothing(farm: Farm, bundle: Any) -> None:
    folder = bundle()
    (one,) = farm.plant(Siblings(), "mlwe", one=WHOLE)
    to = farm.selection("clear", weight_bits=8, check_answers=0)
    farm.sessions.append(ciphertune.session_of(ciphertune.load_client(folder / "client", to, skeleton=meta())))
    assert one.count("weights") == 0


@pytest.mark.parametrize("options", [{}, {"workers": 2, "placement": "rows"}])
def test_weights_from_a_folder(farm: Farm, bundle: Any, options: dict[str, Any]) -> None:
    folder = bundle(**options)
    farm.plant(Siblings(), "mlwe", one=WHOLE)
    check(load(farm, folder, weights=folder if options else folder / "worker"))
    assert farm.hosts["one"].count("weights") == 0


def test_folders_that_do_not_hold_the_weights(farm: Farm, bundle: Any, tmp_path: Path) -> None:
    folder = bundle(workers=2)
    farm.plant(Siblings(), "mlwe", one=WHOLE)
    with pytest.raises(WeightsError, match="lacks row"):
        load(farm, folder, weights=folder / "worker-0")
    with pytest.raises(ConfigError, match="holds no weights"):
        load(farm, folder, weights=tmp_path)
    other = Siblings()
    with torch.no_grad():
        other.q_proj.weight.mul_(-1)
    ciphertune.split(other, tmp_path / "other", layers="all")
    with pytest.raises(WeightsError, match="not those of this model"):
        load(farm, folder, weights=tmp_path / "other" / "worker")


def test_norms_that_are_not_those_of_the_weights(farm: Farm, bundle: Any) -> None:
    folder = bundle()
    file = folder / "client" / "ciphertune.json"
    content = json.loads(file.read_text())
    content["layers"][0]["max_row_norm"] /= 2
    file.write_text(json.dumps(content))
    farm.plant(Siblings(), "mlwe", one=WHOLE)
    with pytest.raises(WeightsError, match=r"q_proj: the norms"):
        load(farm, folder)


def test_progress_is_told_and_an_interrupted_set_up_goes_on(farm: Farm, bundle: Any, empty_cache: Path) -> None:
    told: list[tuple[int, int]] = []

    class Watching:
        @hookimpl
        def ciphertune_preparing(self, done: int, total: int) -> None:
            told.append((done, total))
            if len(told) == 3 + 3:
                raise KeyboardInterrupt

    manager = PluginManager()
    manager.register(Watching())
    (one,) = farm.plant(Siblings(), "mlwe", one=WHOLE)
    folder = bundle()
    load(farm, folder, plugins=manager)
    total = 40 * 270 + 270 * 9
    assert told == [(8000, total), (10800, total), (total, total)]
    for hints in empty_cache.rglob("*.hints"):
        hints.unlink()
    with pytest.raises(KeyboardInterrupt):
        load(farm, folder, plugins=manager)
    assert one.count("close") == 1, "the session is closed"
    load(farm, folder, plugins=manager)
    assert told[6:] == [(270 * 9, 270 * 9)], "the first group was done"


@functools.cache
def held() -> WeightStore:
    return WeightStore.of({"a": quantize(torch.randn(200, 40), 8), "wide": quantize(torch.randn(64, 300_000), 8)})


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"layer": "a", "start": 0, "stop": 200}, None),
        ({"layer": "a", "start": 64, "stop": 65}, None),
        ({"layer": "wide", "start": 0, "stop": 64}, None),
        ({"layer": "b", "start": 0, "stop": 64}, "unknown-layer"),
        ({"layer": "a", "start": 0, "stop": 201}, "protocol"),
        ({"layer": "a", "start": -1, "stop": 64}, "protocol"),
        ({"layer": "a", "start": 64, "stop": 64}, "protocol"),
        ({"layer": "a", "start": 0, "stop": 1 << 80}, "protocol"),
        ({"layer": "a", "start": True, "stop": 64}, "protocol"),
        ({"layer": ["a"], "start": 0, "stop": 64}, "protocol"),
        ({"layer": "a", "start": 0}, "protocol"),
        ({}, "protocol"),
    ],
)
def test_requests_for_weights(fields: dict[str, Any], code: str | None) -> None:
    worker = Worker(held())
    reply = worker.handle(Message("weights", fields), "client")
    assert reply.fields.get("code") == code
    if code is None:
        assert torch.equal(reply.buffers["codes"], worker.weights[fields["layer"]][fields["start"] : fields["stop"]])


def test_a_reply_carries_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciphertune.worker.worker.LARGEST_READING", 100 * 40)
    worker = Worker(held())
    assert LARGEST_READING >= 1 << 24
    replies = [worker.handle(Message("weights", {"layer": "a", "start": 0, "stop": rows})) for rows in (100, 101)]
    assert [reply.kind for reply in replies] == ["ok", "error"]


def test_how_often_weights_are_read_is_bounded() -> None:
    now = [0.0]
    readings = Readings(1000, lambda: now[0])
    readings.count("a", 600)
    readings.count("b", 1000)
    with pytest.raises(QuotaError, match="60 minutes"):
        readings.count("a", 401)
    readings.count("a", 400)
    now[0] = 1800.0
    with pytest.raises(QuotaError, match="30 minutes"):
        readings.count("b", 1)
    now[0] = 3600.0
    readings.count("b", 1000)
    worker = Worker(held(), limits=SessionLimits(readings=1))
    asked = [worker.handle(Message("weights", {"layer": "wide", "start": 0, "stop": 64}), "a") for _ in range(2)]
    assert [reply.fields.get("code") for reply in asked] == [None, "quota"]


def test_a_layer_in_float32_can_be_read_too() -> None:
    weight = LayerWeight(torch.randn(70, 5), None)
    store = WeightStore.of({"a": weight})
    check_of = preparing._Check(describe("a", weight))
    codes = Worker(store).handle(Message("weights", {"layer": "a", "start": 0, "stop": 70})).buffers["codes"]
    assert check_of.wrong(codes, 0, 70) is None
    assert "hash" in str(check_of.wrong(codes + 1, 0, 70))
    assert "expected" in str(check_of.wrong(codes[:-1], 0, 70))


def test_folder_codes_cross_the_border_of_two_workers(bundle: Any) -> None:
    folder = bundle(workers=2)
    weight = quantize(Siblings().q_proj.weight, 8)
    info = describe("q_proj", weight)
    assert torch.equal(FolderCodes(folder).read(info, 0, 200), weight.codes)
    assert not FolderCodes(folder).distrust(info, 0, 200)
