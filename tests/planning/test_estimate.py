"""Plans for many workers: what is sent is what a session sends, and speeds are scaled, kept and read with care."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import remote
import tiny as models
import torch
from click.testing import CliRunner
from farm import Farm
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune.backend import LinearMap
from ciphertune.bundle.placement import Placement
from ciphertune.bundle.worker import load_worker
from ciphertune.cli import cli
from ciphertune.client.choice import choose
from ciphertune.errors import ConfigError, SecurityError
from ciphertune.models.known import skeleton
from ciphertune.outsourcing.convert import outsource
from ciphertune.outsourcing.layers import choose_layers
from ciphertune.planning import measure
from ciphertune.planning.client_compute import attach_instant_session, measure_client_compute
from ciphertune.planning.estimate import Estimate
from ciphertune.planning.measure import Size, measure_products
from ciphertune.planning.plan import Plan, make_plan
from ciphertune.planning.products import Products
from ciphertune.planning.speeds import ClientCompute, Line, LinkSpeed, ProductSpeed, Speeds, read_speeds, write_speeds
from ciphertune.plugins.manager import PluginManager
from ciphertune.selection import SessionOptions
from ciphertune.worker import process

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

KINDS = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
SMALL = {"hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2, "vocab_size": 48}


def speeds(**changes: Any) -> Speeds:
    """A machine of round numbers: a millisecond to encrypt and to decrypt, ten to evaluate."""
    compute = ClientCompute(
        measured=True,
        before={f"{kind} {d}": Line(0.001, 0.0) for kind in KINDS for d in ("forward", "backward")},
        begin=Line(0.002, 0.0),
        head=Line(0.0, 0.001),
        end=Line(0.003, 0.0),
        optimizer=0.004,
    )
    products = tuple(ProductSpeed(d, 24, 128, 128, 0.001, 0.01, 0.001) for d in ("forward", "backward"))
    return dataclasses.replace(Speeds("mlwe", {}, products, 1e-9, compute, None), **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose keys and values are too narrow to be cut in two."""
    torch.manual_seed(3)
    models.llama(**SMALL, max_position_embeddings=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("backend", ["clear", "mlwe"])
@pytest.mark.parametrize(("placement", "workers"), [("layers", 3), ("rows", 2), ("rows", 3), ("replicas", 2)])
def test_workers_are_sent_what_was_planned(
    farm: Farm, folder: Path, tmp_path: Path, placement: Any, workers: int, backend: str, share: int
) -> None:
    from transformers import AutoModelForCausalLM

    bundle = ciphertune.split(str(folder), tmp_path / "bundle", workers=workers, placement=placement)
    farm.serve(**{f"m{i}": load_worker(worker) for i, worker in enumerate(bundle.workers)})
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    adapted = remote.with_adapter(outsource(model, farm.selection(backend, share_inputs=share, weight_bits=8)))
    session = session_of(adapted)
    farm.sessions.append(session)
    parts = (2, 1, 1)  # sequences of 12 tokens
    for rows in parts:
        ids = torch.randint(48, (rows, 12))
        adapted(input_ids=ids, labels=ids).loss.backward()
    planned = [
        make_plan(
            str(folder),
            f"{backend}?share_inputs={share}&weight_bits=8",
            tokens=12 * rows,
            targets=("q_proj", "v_proj", "gate_proj"),
            workers=workers,
            placement=placement,
            measure=False,
        )
        for rows in parts
    ]
    traffic = session.traffic
    assert sum(p.requests for p in planned) == traffic.requests
    assert sum(p.bytes_up for p in planned) == traffic.bytes_up
    assert sum(p.bytes_down for p in planned) == traffic.bytes_down
    assert {p.worker_bytes for p in planned} == {max(bundle.worker_bytes)}


def test_micro_batches_are_sent_one_by_one(folder: Path) -> None:
    arguments: dict[str, Any] = {"workers": 2, "placement": "rows", "measure": False}
    whole = make_plan(str(folder), tokens=24, micro_batches=2, **arguments)
    half = make_plan(str(folder), tokens=12, **arguments)
    assert (whole.requests, whole.bytes_up, whole.bytes_down) == (
        2 * half.requests,
        2 * half.bytes_up,
        2 * half.bytes_down,
    )
    uneven = make_plan(str(folder), tokens=25, micro_batches=2, **arguments)
    more = make_plan(str(folder), tokens=13, **arguments)
    assert uneven.bytes_down == half.bytes_down + more.bytes_down


def test_the_step_is_what_each_part_takes(folder: Path) -> None:
    plan = planned(folder, tokens=24, latency=0.5)
    found = plan.estimate
    assert found is not None
    # 8 products forward and 7 backward; one encryption, evaluation and decryption each.
    assert plan.requests == 15
    assert found.rest == pytest.approx(0.002 + 7 * 0.001 + 24 * 0.001 + 6 * 0.001 + 0.003 + 0.004)
    assert found.network == pytest.approx(15 * 2 * 0.5 + (plan.bytes_up + plan.bytes_down) / 125e6)
    assert found.total == pytest.approx(found.encrypt + found.evaluate + found.decrypt + found.network + found.rest)
    assert sum(found.path.values()) == pytest.approx(found.total)
    assert found.path["latency"] == pytest.approx(15)
    assert (found.limit, found.bottleneck) == ("network", "latency")
    assert (found.client_compute_measured, found.link_measured) == (True, False)


def planned(folder: Path, **changes: Any) -> Plan:
    return make_plan(str(folder), **{"client": speeds(), "worker": speeds(), **changes})


def total(folder: Path, **changes: Any) -> float:
    estimate = planned(folder, **{"tokens": 24, "latency": 0.0, **changes}).estimate
    assert estimate is not None
    return estimate.total


def test_more_workers_help_where_they_can(folder: Path) -> None:
    one = total(folder)
    assert total(folder, workers=2, placement="replicas") == pytest.approx(one)
    assert total(folder, workers=2, placement="layers") == pytest.approx(one)
    assert total(folder, workers=2, placement="rows") < 0.9 * one
    halves = {"micro_batches": 2, "interleave": 2}
    assert total(folder, workers=2, placement="replicas", **halves) < 0.9 * total(folder, workers=1, **halves)
    assert total(folder, workers=2, placement="rows", processors="shared by workers") > total(
        folder, workers=2, placement="rows"
    )


def test_the_fastest_placement_is_planned_and_more_workers_never_slower(folder: Path) -> None:
    fast: dict[str, Any] = {"tokens": 24, "latency": 0.0, "bandwidth": 1e12}
    found = planned(folder, workers=4, **fast)
    assert found.placement == found.tried[0].placement == "rows:4"
    assert found.estimate is not None
    assert found.estimate.total == found.tried[0].seconds == min(each.seconds for each in found.tried)
    assert {each.placement for each in found.tried} == {
        "rows:4",
        "layers:2,rows:2",
        "layers:4",
        "rows:2,replicas:2",
        "replicas:4",
    }
    assert [each.workers for each in found.fewer] == [1, 2]
    assert found.fewer[0].seconds > found.fewer[1].seconds > found.estimate.total
    # Each of them is what a plan that asks for it says.
    for each in found.tried:
        assert total(folder, workers=4, placement=each.placement, **fast) == pytest.approx(each.seconds)


def test_a_narrow_line_and_small_memories_decide_the_placement(folder: Path) -> None:
    thin = planned(folder, workers=2, tokens=24, latency=0.0, bandwidth=1e4, micro_batches=2, interleave=None)
    assert thin.placement == "layers:2"  # rows send the same ciphertext to both
    assert thin.estimate is not None
    assert thin.estimate.bottleneck in ("uplink", "downlink")
    whole = planned(folder).worker_bytes
    small = planned(folder, workers=4, worker_memory=0.4 * whole)
    assert all(each.worker_bytes <= 0.4 * whole for each in small.tried)
    assert "replicas" not in small.placement
    with pytest.raises(ConfigError, match="use more workers"):
        planned(folder, workers=2, worker_memory=0.2 * whole)
    assert [each.workers for each in planned(folder, workers=4).fewer] == [1, 2]
    assert small.fewer == (), "neither one nor two workers hold the weights"
    halves = planned(folder, workers=4, worker_memory=0.6 * whole).fewer
    assert [each.workers for each in halves] == [2]
    assert all(each.worker_bytes <= 0.6 * whole for each in halves)


def test_without_speeds_rows_are_planned(folder: Path) -> None:
    found = make_plan(str(folder), workers=3, measure=False)
    assert (found.placement, found.tried, found.fewer) == ("rows:3", (), ())


def test_halves_cost_little_more_than_half(folder: Path) -> None:
    whole, halves = total(folder, tokens=512), total(folder, tokens=512, micro_batches=2)
    assert whole < halves < 1.1 * whole


def test_what_is_computed_ahead_fills_idle_time(folder: Path) -> None:
    """And prolongs the step by what does not fit."""

    def ahead(seconds: float, **changes: Any) -> Estimate:
        products = tuple(dataclasses.replace(p, ahead=seconds) for p in speeds().products)
        found = planned(folder, tokens=24, latency=0.0, client=speeds(products=products), **changes).estimate
        assert found is not None
        return found

    none, little, much = ahead(0.0), ahead(1e-4), ahead(1.0)
    # The client is busy for the rest of the step.
    idle = none.evaluate + none.network
    assert little.total == pytest.approx(none.total)
    assert little.encrypt > none.encrypt
    assert little.encrypt - none.encrypt < idle
    assert much.total == pytest.approx(none.total + (much.encrypt - none.encrypt) - idle)
    assert sum(much.path.values()) == pytest.approx(much.total)
    assert much.busy["client"] == pytest.approx(1.0)
    # A worker that shares the client's processor leaves it idle while messages are on their way.
    alone = ahead(1.0, processors="one")
    assert alone.total == pytest.approx(none.total + (alone.encrypt - none.encrypt) - none.network)


@pytest.mark.parametrize(("to", "some"), [("mlwe", True), ("mlwe?ahead=0", False), ("simulation", False)])
def test_what_can_be_computed_ahead_is_measured_by_itself(to: str, some: bool) -> None:
    sizes = [Size("forward", 200, 64, 96), Size("backward", 32, 96, 64)]
    assert [product.ahead > 0 for product in measure_products(to, sizes)] == [some] * 2


def test_a_closed_session_computes_nothing_ahead() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    session = session_of(outsource(model, "mlwe", "all", plugins=PluginManager()))
    assert session.compute_ahead(0, "forward", 200) > 0
    session.close()
    with pytest.raises(SecurityError, match="closed"):
        session.compute_ahead(0, "forward", 200)


def test_faster_workers_are_faster(folder: Path) -> None:
    gpu = speeds(products=tuple(dataclasses.replace(p, evaluate=p.evaluate / 10) for p in speeds().products))
    found = planned(folder, worker=gpu).estimate
    slow = planned(folder).estimate
    assert found is not None
    assert slow is not None
    assert found.evaluate == pytest.approx(slow.evaluate / 10)
    assert (found.encrypt, found.rest) == (pytest.approx(slow.encrypt), pytest.approx(slow.rest))


def test_what_the_transport_costs_counts(folder: Path) -> None:
    with_link = total(folder, client=speeds(link=LinkSpeed(1e6, 0.1, 1e-6, 0.1)))
    plan = planned(folder, tokens=24)
    more = 15 * 0.1 + (plan.bytes_up + plan.bytes_down) * (1 / 1e6 - 1 / 125e6)
    assert with_link == pytest.approx(total(folder) + more)


def test_what_a_transport_leaves_to_the_client_bounds_all_its_connections() -> None:
    assert LinkSpeed(1e6, 0.0, 0.75e-6, 0.0).client_rate == pytest.approx(4e6)
    assert LinkSpeed(1e6, 0.0, 2e-6, 0.0).client_rate == math.inf


def test_products_are_scaled_from_the_nearest() -> None:
    backend = choose("mlwe").backend
    near, far = (ProductSpeed("forward", 64, k, k, 1e-3, 1e-2, 1e-3) for k in (64, 4096))
    one = speeds(products=(near, far))
    here = LinearMap("", "forward", 64, 64, 1.0)
    assert one.seconds(backend, "evaluate", here, 64) == pytest.approx(1e-2, rel=0.01)
    # Requests carry their own tokens and nothing else.
    assert one.seconds(backend, "evaluate", here, 128) == pytest.approx(2e-2, rel=0.01)
    # What was measured backward says nothing of forward where there is better.
    other = speeds(products=(near, dataclasses.replace(near, direction="backward", evaluate=7.0)))
    assert other.seconds(backend, "evaluate", here, 64) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"micro_batches": 2, "interleave": 3}, "between 1 and the number of micro-batches, 2"),
        ({"tokens": 4, "micro_batches": 5}, "4 tokens cannot be divided into 5"),
        ({"workers": 0}, "above 0"),
        ({"to": "mlwe?request_bits=24"}, "the client's speeds was measured with mlwe, and this plan is for mlwe.req"),
        ({"client": speeds(client_compute=None)}, "lack its own computation"),
        (
            {
                "client": speeds(
                    client_compute=dataclasses.replace(speeds().client_compute, before={"c_attn forward": Line(0, 0)})  # type: ignore[type-var]
                )
            },
            "another mod",
        ),
    ],
)
def test_plans_that_cannot_be(folder: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        planned(folder, **changes)


def test_speeds_survive_their_file(tmp_path: Path) -> None:
    for one in (speeds(), speeds(client_compute=None, link=LinkSpeed(1e9, 1e-3, 1e-9, 1e-3))):
        write_speeds(one, tmp_path / "speeds.json")
        assert read_speeds(tmp_path / "speeds.json") == one
    with pytest.raises(ConfigError, match="cannot write speeds"):
        write_speeds(speeds(), tmp_path / "nowhere" / "speeds.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("copy",), -1.0),
        (("copy",), float("nan")),
        (("copy",), "fast"),
        (("copy",), True),
        (("products",), []),
        (("products",), None),
        (("products", 0, "evaluate"), float("inf")),
        (("products", 0, "tokens"), 0),
        (("products", 0, "tokens"), 2.5),
        (("products", 0, "direction"), "sideways"),
        (("client_compute", "before"), [1]),
        (("client_compute", "head", "fixed"), None),
        (("link",), {"rate": 0, "overhead": 0}),
        (("machine",), 3),
    ],
)
def test_damaged_speeds_are_refused(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    file = tmp_path / "speeds.json"
    write_speeds(speeds(), file)
    whole = json.loads(file.read_text())
    place = whole
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=r"speeds\.json is damaged"):
        read_speeds(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "ciphertune-speeds-9"}', "\xff"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "speeds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"speeds\.json"):
        read_speeds(tmp_path / "speeds.json")


def test_the_clients_own_part_is_measured_with_its_own_blocks(folder: Path) -> None:
    model = skeleton(str(folder), num_hidden_layers=2)
    chosen = choose_layers(model, None, PluginManager(), allow_meta=True)
    found = measure_client_compute(model, chosen, SessionOptions(), ("q_proj", "v_proj"), 32, 16)
    assert found.measured
    assert set(found.before) == set(speeds().client_compute.before)  # type: ignore[union-attr]
    assert all(line.at(32) > 0 for name, line in found.before.items())
    assert all(line.at(32) > 0 for line in (found.begin, found.head, found.end))


def test_products_that_cost_nothing_come_in_the_order_of_real_ones(folder: Path, recorder: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = skeleton(str(folder))
    chosen = choose_layers(model, None, PluginManager(), allow_meta=True)
    session = attach_instant_session(model, chosen, SessionOptions())
    real: Any = AutoModelForCausalLM.from_pretrained(folder)
    outsource(real, "clear", plugins=recorder.plugins)
    ids = torch.randint(48, (1, 8))
    for each in (model, real):
        remote.with_adapter(each)(input_ids=ids, labels=ids).loss.backward()
    asked = [("+".join(n.rpartition(".")[2] for n in e.layers), e.direction) for e in recorder.answered]
    assert [(mark.layers, mark.direction) for mark in session.marks] == asked
    # And in the order in which a plan has them.
    model_plan = Products(str(folder), "clear", None, ("q_proj",)).placed(Placement())
    backward = [(group.layers, "backward") for group in reversed(model_plan.groups) if group.backward]
    assert asked == [(group.layers, "forward") for group in model_plan.groups] + backward
    session_of(real).close()


def test_other_models_are_guessed(tmp_path: Path, tiny: Callable[[str], nn.Module]) -> None:
    model: Any = tiny("bert")
    model.save_pretrained(tmp_path)
    found = make_plan(str(tmp_path), tokens=8, targets=("query",)).estimate
    assert found is not None
    assert not found.client_compute_measured
    assert found.rest > 0


@pytest.mark.slow
def test_a_transport_is_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(measure, "_LINK_ROUNDS", 3)  # the figures' spread is of no interest here
    monkeypatch.setattr(process, "subprocess", subprocess)  # a worker's process that starts anew, as all do in earnest
    found = measure.measure_link("zmq", {"insecure": "1"})
    assert found.rate > 1e5  # however little longer the long message took beside other work
    assert 0 <= found.overhead < 5
    assert 0 <= found.worker_request < 5
    # A worker's end of it is not all, nor free.
    assert 0 < found.worker_byte < 1e-5
    asked = []

    def link(*arguments: Any) -> LinkSpeed:
        asked.append(arguments)
        return LinkSpeed(1e9, 1e-3, 1e-9, 1e-3)

    monkeypatch.setattr(measure, "measure_link", link)
    plan = make_plan(str(folder), "mlwe+zmq://10.0.0.5:1?insecure=1&pad_tokens=16&timeout=3", tokens=8)
    assert asked == [("zmq", {"insecure": "1"})]
    assert plan.speeds is not None
    assert (plan.speeds.to, plan.speeds.link) == ("mlwe?pad_tokens=16", LinkSpeed(1e9, 1e-3, 1e-9, 1e-3))


def test_measuring_leaves_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    make_plan(str(folder), tokens=8)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("model", "weights"), [("llama-3-8b", 8.03e9), ("llama-3-70b", 70.6e9)])
def test_built_in_shapes(model: str, weights: float) -> None:
    found = make_plan(model, workers=64, placement="rows", measure=False)
    assert found.outsourced + found.at_client == pytest.approx(weights, rel=0.001)
    assert found.client_bytes == 2 * found.at_client
    # Keys and values have too few rows for 64 workers, so some hold more than others.
    assert found.outsourced / 64 < found.worker_bytes < 1.2 * found.outsourced / 64


def test_the_command_shows_what_limits_a_step(folder: Path, tmp_path: Path) -> None:
    client, worker = tmp_path / "client.json", tmp_path / "worker.json"
    write_speeds(speeds(), client)
    write_speeds(speeds(client_compute=None), worker)
    arguments = ["plan", str(folder), "--workers", "2", "--placement", "rows", "--micro-batches", "2"]
    arguments += ["--interleave", "2", "--client-speeds", str(client), "--worker-speeds", str(worker)]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("waiting for", "evaluation at the workers", "busiest worker", "Most of it is", "a worker holds"):
        assert text in shown.output
    assert shown.output.count("|") == 8
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    estimate = found["estimate"]
    assert sum(estimate["path"].values()) == pytest.approx(estimate["total"])
    assert (found["workers"], found["placement"], found["interleave"]) == (2, "rows:2", 2)
    assert {"limit", "bottleneck", "busy", "chart"} <= estimate.keys()


def test_the_command_keeps_speeds(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    arguments = ["plan", str(folder), "--tokens", "8", "--save-speeds", str(path)]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    kept = read_speeds(path)
    assert json.loads(result.stdout)["speeds"]["to"] == kept.to == "mlwe"
    refused = CliRunner().invoke(cli, [*arguments, "--no-measure"])
    assert isinstance(refused.exception, ConfigError)
