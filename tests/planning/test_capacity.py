"""Many clients at the workers of a model: queues against closed formulas, and what the command says of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny as models
import torch
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st

from ciphertune.cli import cli
from ciphertune.errors import CipherTuneError, ConfigError
from ciphertune.planning.capacity import CHATS, TRAINING, CapacityPlan, ClientMix, Prices, plan_capacity, with_transport
from ciphertune.planning.queueing import Kind, Lines, Load, Pass, simulate_clients
from ciphertune.planning.simulation import MicroBatch, Product, Request
from ciphertune.planning.speeds import ClientCompute, Line, LinkSpeed, ProductSpeed, Speeds, write_speeds

KINDS = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
FAST = Lines(up=1e12, down=1e12, latency=0.0, worker=1e12)


def speeds(evaluate: float = 0.01) -> Speeds:
    """A machine of round numbers."""
    compute = ClientCompute(
        measured=True,
        before={f"{kind} {d}": Line(0.001, 0.0) for kind in KINDS for d in ("forward", "backward")},
        begin=Line(0.002, 0.0),
        head=Line(0.0, 0.001),
        end=Line(0.003, 0.0),
        optimizer=0.004,
    )
    products = tuple(ProductSpeed(d, 24, 128, 128, 0.001, evaluate, 0.001) for d in ("forward", "backward"))
    return Speeds("mlwe", {}, products, 1e-9, compute, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    target = tmp_path_factory.mktemp("capacity") / "model"
    models.llama(
        hidden_size=128, intermediate_size=200, num_hidden_layers=2, vocab_size=48, max_position_embeddings=64
    ).save_pretrained(target)
    return target


def plan(folder: Path, clients: int = 8, chats: float = 0.0, **changes: Any) -> CapacityPlan:
    mix = ClientMix(clients, chats, tokens=24, new_tokens=4, prompt_tokens=8, think=0.1)
    return plan_capacity(str(folder), mix=mix, **{"client": speeds(), "worker": speeds(), "requests": 4000, **changes})


def one_product(evaluate: float, rest: float = 0.0, up: int = 0, down: int = 0) -> tuple[Pass, ...]:
    request = Request(workers=(0,), encrypt=0.0, up=up, evaluate=evaluate, down=down, decrypt=0.0)
    return (Pass(MicroBatch([Product(rest, (request,))]), tokens=1),)


def load(clients: int, cycle: tuple[Pass, ...], lines: Lines = FAST, workers: int = 1) -> Load:
    return simulate_clients([Kind("one", clients, cycle)], workers, lines, 3000)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.floats(0.001, 1.0), st.floats(0.001, 10.0))
def test_throughput_keeps_within_the_bounds_of_closed_queues(clients: int, evaluate: float, rest: float) -> None:
    """Asymptotic bounds: N / (N·D + Z) at least, min(1 / D, N / (D + Z)) at most."""
    found = load(clients, one_product(evaluate, rest)).kinds["one"]
    least, most = clients / (clients * evaluate + rest), min(1 / evaluate, clients / (evaluate + rest))
    assert least * 0.97 <= found.tokens_per_second <= most * 1.03
    assert found.alone == pytest.approx(evaluate + rest)
    # Little's law: clients are as many as those who go through, times the seconds that each takes.
    assert found.median * found.tokens_per_second == pytest.approx(clients, rel=0.05)


def test_a_card_is_a_queue_as_well() -> None:
    slow = dataclasses.replace(FAST, worker=1000.0)
    found = load(20, one_product(0.001, up=10, down=500), slow)
    assert found.busiest == "sending"
    assert found.sending == pytest.approx(1.0, abs=0.01)
    assert found.receiving == pytest.approx(10 / 500, abs=0.01)
    assert found.kinds["one"].tokens_per_second == pytest.approx(2.0, rel=0.01)
    assert found.bytes_per_second == pytest.approx(1020, rel=0.01)


def test_processors_that_clients_share_are_a_queue_as_well() -> None:
    request = Request(workers=(0,), encrypt=0.03, up=0, evaluate=0.01, down=0, decrypt=0.02)
    cycle = (Pass(MicroBatch([Product(0.05, (request,))]), tokens=1),)
    own, one, two, together = (
        load(10, cycle, dataclasses.replace(FAST, processors=count, with_workers=count == 1 and shared))
        for count, shared in ((0, False), (1, False), (2, False), (1, True))
    )
    rates = [each.kinds["one"].tokens_per_second for each in (own, one, two, together)]
    # Ten clients of 0.11 s each; one processor with 0.1 s for each product, or two; or with the evaluation on top.
    assert rates == pytest.approx([10 / 0.11, 10, 20, 1 / 0.11], rel=0.03)
    assert [each.kinds["one"].alone for each in (own, one, two, together)] == pytest.approx([0.11] * 4)


def test_two_workers_of_a_copy_share_what_either_can_do() -> None:
    request = Request(workers=(0, 1), encrypt=0.0, up=0, evaluate=0.1, down=0, decrypt=0.0)
    cycle = (Pass(MicroBatch([Product(0.0, (request,))]), tokens=1),)
    assert load(10, cycle, workers=2).kinds["one"].tokens_per_second == pytest.approx(20, rel=0.02)


def test_more_workers_until_clients_wait_no_longer_than_they_may(folder: Path) -> None:
    found = plan(folder, workers=2, prices=Prices(worker=36.0))
    assert found.asked is not None
    assert (found.asked.workers, found.placement) == (2, "rows:1")
    assert found.enough.slowdown <= 1.5
    assert all(one.slowdown > 1.5 for one in found.tried[:-1])
    assert [one.workers for one in found.tried] == sorted({one.workers for one in found.tried})
    assert found.enough.workers <= 8
    # 36 an hour is a hundredth a second for each worker.
    assert found.asked.price == pytest.approx(1e6 * 0.02 / found.asked.tokens_per_second)
    assert found.asked.tokens_per_second < found.enough.tokens_per_second


def test_a_hundred_thousand_clients_are_as_many_copies(folder: Path) -> None:
    few = plan(folder, 40, 0.5, workers=10).asked
    many = plan(folder, 40_000, 0.5, workers=10_000).asked
    assert few is not None
    assert many is not None
    assert many.kinds == few.kinds
    assert many.tokens_per_second == pytest.approx(1000 * few.tokens_per_second)
    assert many.bytes_per_second == pytest.approx(1000 * few.bytes_per_second)


def test_chats_and_training_are_both_served(folder: Path) -> None:
    found = plan(folder, 6, 0.5, workers=1)
    assert found.asked is not None
    assert set(found.asked.kinds) == {TRAINING, CHATS}
    assert found.asked.kinds[CHATS].alone < found.asked.kinds[TRAINING].alone
    assert all(one.median >= one.alone * 0.99 for one in found.asked.kinds.values())


def test_a_transport_takes_the_workers_time(folder: Path) -> None:
    linked = dataclasses.replace(speeds(), link=LinkSpeed(1e9, 0.02, 1e-9, 0.02))
    without, found = (plan(folder, 8, workers=1, client=client).asked for client in (speeds(), linked))
    assert without is not None
    assert found is not None
    # A saturated worker: each of the 15 products of a step takes 20 ms more of it.
    steps = [one.tokens_per_second / 24 for one in (without, found)]
    assert 1 / steps[1] - 1 / steps[0] == pytest.approx(15 * 0.02, rel=0.1)


def test_a_worker_may_be_busy_when_its_reply_has_left() -> None:
    request = with_transport(Request((0,), 0.0, 0, 0.05, 0, 0.0), waited=0.02, worked=0.05)
    assert (request.evaluate, request.after, request.decrypt) == pytest.approx((0.07, 0.03, 0.0))
    cycle = (Pass(MicroBatch([Product(0.03, (request,))]), tokens=1),)
    alone, many = load(1, cycle).kinds["one"], load(20, cycle)
    assert alone.median == pytest.approx(0.1)  # the worker is done before the next request
    assert many.kinds["one"].tokens_per_second == pytest.approx(10, rel=0.02)
    assert many.evaluating == pytest.approx(1.0, abs=0.01)
    # What the worker does not do, the client does.
    lighter = with_transport(Request((0,), 0.0, 0, 0.05, 0, 0.0), waited=0.05, worked=0.02)
    assert (lighter.evaluate, lighter.after, lighter.decrypt) == pytest.approx((0.07, 0.0, 0.03))


def test_memory_decides_how_many_workers_hold_a_copy(folder: Path) -> None:
    whole = plan(folder).worker_bytes
    found = plan(folder, worker_memory=0.6 * whole)
    assert found.placement == "layers:2"
    assert all(one.workers % 2 == 0 for one in found.tried)
    with pytest.raises(ConfigError, match="name a placement with rows"):
        plan(folder, worker_memory=1)
    with pytest.raises(ConfigError, match="cannot be divided into copies of 2"):
        plan(folder, worker_memory=0.6 * whole, workers=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 0}, "above 0"),
        ({"chats": 1.5}, "no share"),
        ({"slowdown": 1.0}, "more than 1"),
        ({"client": None, "worker": None, "measure": False}, "needs speeds"),
        ({"clients": 9000, "workers": 2}, "name 5 workers or more"),
    ],
)
def test_wrong_questions(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CipherTuneError, match=message):
        plan(folder, **changes)


def test_the_command_answers_how_many_workers_clients_need(folder: Path, tmp_path: Path) -> None:
    write_speeds(speeds(), tmp_path / "speeds.json")
    arguments = ["plan", str(folder), "--clients", "6", "--chats", "0.5", "--tokens", "24", "--new-tokens", "4"]
    arguments += ["--workers", "1", "--worker-price", "1", "--think", "0.1s"]
    arguments += ["--client-speeds", str(tmp_path / "speeds.json"), "--worker-speeds", str(tmp_path / "speeds.json")]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("a copy of the model", "enough", "limit", "99th percentile", "price"):
        assert text in shown.output
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert found["asked"]["workers"] == 1
    assert found["tried"][-1]["kinds"].keys() == {"training", "chats"}
    for wrong in (["--generate"], ["--one-machine"], ["--micro-batches", "2"]):
        assert isinstance(CliRunner().invoke(cli, [*arguments, *wrong]).exception, ConfigError)
    alone = CliRunner().invoke(cli, ["plan", str(folder), "--chats", "0.5", "--no-measure"])
    assert isinstance(alone.exception, ConfigError)
