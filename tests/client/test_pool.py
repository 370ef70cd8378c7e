"""Products at several workers that fail, hang, forget and come back: right, or a clear error in time."""

from __future__ import annotations

import copy
import logging
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import farm as farming
import pytest
import torch
from farm import SECONDS, Farm, Host, never, thread
from torch import Tensor, nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.client.request import PendingRequest
from ciphertune.client.session import Session
from ciphertune.client.timeouts import Timeouts
from ciphertune.errors import (
    ReplyError,
    SelectionError,
    TransportError,
    TransportTimeoutError,
    UnknownLayerError,
    WorkerError,
)
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager
from ciphertune.protocol import Message, error_message, spoken_versions
from ciphertune.weights import LayerWeight, quantize
from ciphertune_clear import ClearBackend, ClearClient


@pytest.fixture
def farm(register: Any) -> Iterator[Farm]:
    made = Farm(register)
    yield made
    made.close()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 192)
        self.k_proj = nn.Linear(24, 128, bias=False)
        self.v_proj = nn.Linear(24, 70)
        self.o_proj = nn.Linear(390, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).tanh())


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention()


def single() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 192))


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 2, y.shape[-1])).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
QKV = ["q_proj", "k_proj", "v_proj"]
PLANS: dict[str, dict[str, farming.Blocks]] = {
    "one worker": {"a": [QKV, ["o_proj"]]},
    "part of the layers each": {"a": [QKV], "b": [["o_proj"]]},
    "siblings at three workers": {"a": [["q_proj"], ["o_proj"]], "b": [["k_proj"]], "c": [["v_proj"]]},
    "siblings around one elsewhere": {"a": [["q_proj", "v_proj"]], "b": [["k_proj"], ["o_proj"]]},
    "siblings in the other order": {"a": [QKV[::-1], ["o_proj"]]},
    "replicas": {"a": [QKV, ["o_proj"]], "b": [QKV, ["o_proj"]]},
    "rows cut in two": {
        "a": [[("q_proj", 0, 64), ("k_proj", 0, 64), ("v_proj", 0, 64)], ["o_proj"]],
        "b": [[("q_proj", 64, None), ("k_proj", 64, None), ("v_proj", 64, None)]],
    },
    "rows cut in three": {
        "a": [[("q_proj", 0, 64)], ["k_proj"], [("v_proj", 0, 64)]],
        "b": [[("q_proj", 64, 128), ("v_proj", 64, 70)]],
        "c": [[("q_proj", 128, 192)], ["o_proj"]],
    },
    "cut, with a replica of one part": {
        "a": [[("q_proj", 0, 128), "k_proj"], ["o_proj"]],
        "b": [[("q_proj", 0, 128), "k_proj"]],
        "c": [[("q_proj", 128, 192), "v_proj"]],
    },
    "whole and cut": {"a": [["q_proj"], [("k_proj", 0, 64), "v_proj"]], "b": [[("k_proj", 64, 128)], ["o_proj"]]},
    "more than is needed": {"a": [QKV, ["o_proj"]], "b": [[("q_proj", 0, 64)], ["v_proj"]], "c": []},
}


@pytest.mark.parametrize("share_inputs", [0, 1])
@pytest.mark.parametrize("plan", PLANS)
def test_it_is_the_same_as_linear_layers(farm: Farm, plan: str, share_inputs: int) -> None:
    model = attention()
    expected = gradients(copy.deepcopy(model), X)
    farm.plant(model, **PLANS[plan])  # type: ignore[arg-type]
    session = farm.outsource(model, share_inputs=share_inputs)
    for got, want in zip(gradients(model, X), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert session.traffic.retries == 0


@pytest.mark.parametrize("plan", PLANS)
def test_encrypted_it_is_as_good_as_at_one_worker(farm: Farm, plan: str) -> None:
    model, rounded = attention(), attention()
    for module in rounded.children():
        assert isinstance(module, nn.Linear)
        module.weight.data = quantize(module.weight, 8).dequantize()
    exact = gradients(rounded, X)
    here = attention()
    ciphertune.outsource(here, "mlwe", "all")
    noisy = gradients(here, X)
    farm.plant(model, "mlwe", **PLANS[plan])
    farm.outsource(model, "mlwe")
    for got, alone, want in zip(gradients(model, X), noisy, exact, strict=True):
        usual = float((alone - want).norm())
        assert 0 < usual < 0.02 * float(want.norm())
        # A sum of parts has the noise of each.
        assert 0 < float((got - want).norm()) < 3 * usual
    ciphertune.session_of(here).close()


@pytest.mark.parametrize("backend", ["clear?weight_bits=8", "mlwe"])
@pytest.mark.parametrize(
    "options",
    [{}, {"shards": 2}, {"shards": 2, "by": "rows"}, {"shards": 3, "by": "rows"}, {"replicas": 3}],
    ids=str,
)
def test_what_split_makes_is_served(farm: Farm, tmp_path: Path, options: dict[str, Any], backend: str) -> None:
    name, _, bits = backend.partition("?")
    here = ciphertune.outsource(attention(), "clear?weight_bits=8", "all")
    result = ciphertune.split(attention(), tmp_path / "bundle", layers="all", **options)
    hosts = farm.serve(**{f"m{i}": load_worker(folder) for i, folder in enumerate(result.workers)})
    model = attention()
    session = farm.outsource(model, name, **dict([bits.split("=")] if bits else []))  # type: ignore[arg-type]
    for got, want in zip(gradients(model, X), gradients(here, X), strict=True):
        assert float((got - want).norm() / want.norm()) < (1e-5 if name == "clear" else 2e-2)
    counts = [host.count("evaluate") for host in hosts]
    assert session.traffic.requests == sum(counts)
    assert min(counts) > 0
    if not options or "replicas" in options:
        assert session.traffic.requests == 4, "siblings are one product each way"
        assert max(counts) - min(counts) <= 1


def test_what_crosses_is_counted_once_for_each_worker(farm: Farm) -> None:
    for number, (blocks, requests) in enumerate(
        [({"a": [QKV]}, 1), ({"a": [["q_proj", "v_proj"]], "b": [["k_proj"]]}, 2)]
    ):
        model = attention()
        farm.hosts.clear()
        hosts = farm.plant(model, **{f"{name}{number}": held for name, held in blocks.items()}, o=[["o_proj"]])  # type: ignore[arg-type]
        session = farm.outsource(model)
        before = [host.bytes_in for host in hosts]
        with torch.no_grad():
            model(X)
        traffic = session.traffic
        assert traffic.requests == requests + 1
        assert traffic.bytes_up == requests * X.nbytes + 10 * 390 * 4
        assert traffic.bytes_down == 10 * (390 + 40) * 4
        assert [h.bytes_in - b for h, b in zip(hosts, before, strict=True)] == [
            *[X.nbytes] * requests,
            10 * 390 * 4,
        ]
        forward = copy.copy(traffic)
        gradients(model, X)
        both_ways = traffic.since(forward)
        # Each worker gets the gradient's columns that are its own, and all send back a sum for the whole input.
        assert both_ways.requests == 2 * forward.requests
        assert both_ways.bytes_up - forward.bytes_up == 10 * (390 + 40) * 4
        assert both_ways.bytes_down - forward.bytes_down == requests * X.nbytes + 10 * 390 * 4


def both(farm: Farm, **options: Any) -> tuple[Session, Host, Host]:
    """A layer held by two replicas."""
    model = single()
    first, second = farm.plant(model, a=[["0"]], b=[["0"]])
    return farm.outsource(model, **options), first, second


def alone(farm: Farm, **options: Any) -> tuple[Session, Host]:
    model = single()
    (host,) = farm.plant(model, a=[["0"]])
    return farm.outsource(model, **options), host


FLAT = X.reshape(-1, 24)
PRODUCT = FLAT @ single()[0].weight.t().detach()


def product(session: Session) -> Tensor:
    return session.product(0, "forward", FLAT)


def check(session: Session) -> None:
    """A product is what it should be."""
    torch.testing.assert_close(product(session), PRODUCT, rtol=1e-5, atol=1e-5)


def fail_with(code: str, text: str = "as told") -> farming.Script:
    return lambda request: error_message(code, text)


def raising(error: Exception) -> farming.Script:
    def script(request: Message) -> Message:
        raise error

    return script


class Gate:
    """Holds requests back until it is opened."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, request: Message) -> Message:
        self.reached.set()
        assert self.open.wait(SECONDS)
        return self._host.answer(request)


def test_replicas_take_turns(farm: Farm) -> None:
    session, first, second = both(farm)
    for _ in range(6):
        check(session)
    assert (first.count("evaluate"), second.count("evaluate")) == (3, 3)


def test_a_busy_replica_is_passed_by(farm: Farm) -> None:
    session, first, second = both(farm)
    gate = Gate(first)
    first.on("evaluate", gate)
    with thread(lambda: check(session)) as done:
        assert gate.reached.wait(SECONDS)
        for _ in range(4):
            check(session)
        gate.open.set()
        done.result(SECONDS)
    assert (first.count("evaluate"), second.count("evaluate")) == (1, 4)


def test_many_threads_spread_over_the_replicas(farm: Farm) -> None:
    session, *hosts = both(farm)
    meeting = threading.Barrier(8)

    def meet(request: Message, host: Host) -> Message:
        meeting.wait(SECONDS)
        return host.answer(request)

    for host in hosts:
        host.on("evaluate", lambda request, host=host: meet(request, host), always=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check(session), range(8)))
    assert [host.count("evaluate") for host in hosts] == [4, 4]


def test_a_replica_takes_over_from_a_worker_that_dies(farm: Farm) -> None:
    session, first, second = both(farm)
    first.on("evaluate", first.crash)
    check(session)
    assert (session.traffic.requests, session.traffic.retries) == (1, 1)
    assert session.traffic.bytes_up == FLAT.nbytes
    for _ in range(3):
        check(session)
    assert second.count("evaluate") == 4
    assert first.count("evaluate") == 1


def test_a_part_of_a_layer_is_asked_again_alone(farm: Farm) -> None:
    model = single()
    parts = [[("0", 0, 64)]], [[("0", 64, None)]]
    farm.plant(model, a=parts[0], b=parts[1], c=parts[1])
    session = farm.outsource(model)
    hosts = farm.hosts
    hosts["b"].on("evaluate", hosts["b"].crash)
    check(session)
    assert [hosts[name].count("evaluate") for name in "abc"] == [1, 1, 1]
    assert (session.traffic.requests, session.traffic.retries) == (2, 1)
    g = torch.randn(10, 192)
    expected = g @ single()[0].weight.detach()
    torch.testing.assert_close(session.product(0, "backward", g), expected, rtol=1e-4, atol=1e-4)


def test_the_only_worker_comes_back_without_its_sessions(farm: Farm) -> None:
    session, host = alone(farm)

    def die(request: Message) -> None:
        host.crash()
        timer = threading.Timer(0.3, host.restart)
        timer.daemon = True
        timer.start()

    host.on("evaluate", die)
    check(session)
    assert session.traffic.retries >= 2, "lost once, not known once"
    assert (host.count("open"), host.worker.sessions) == (2, 1)


def test_a_session_that_was_forgotten_is_opened_once(farm: Farm) -> None:
    session, host = alone(farm)
    meeting = threading.Barrier(8)

    def meet(request: Message) -> Message:
        meeting.wait(SECONDS)
        return host.answer(request)

    host.on("evaluate", *[meet] * 8)
    host.restart()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check(session), range(8)))
    assert (host.count("open"), host.worker.sessions) == (2, 1)
    assert session.traffic.retries == 8


def test_a_worker_that_never_knows_its_sessions_is_not_asked_without_end(farm: Farm) -> None:
    session, host = alone(farm, deadline=0.5)

    def forget(request: Message) -> Message:
        host.restart()
        return host.answer(request)

    host.on("evaluate", forget, always=True)
    with pytest.raises(TransportTimeoutError, match="a: it does not know the session that it opened"):
        product(session)
    assert 2 <= host.count("evaluate") < 20
    host.script = host.answer
    session.close()


class Silence:
    """Notes what hooks are told of workers that stop answering."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.left: list[float] = []

    @hookimpl
    def ciphertune_worker_silent(self, worker: str, problem: str, seconds: float) -> None:
        self.told.append(("silent", worker, problem))
        self.left.append(seconds)

    @hookimpl
    def ciphertune_worker_back(self, worker: str, seconds: float) -> None:
        self.told.append(("back", worker))


def test_a_worker_that_stops_answering_is_told_of_once_until_it_is_back(farm: Farm) -> None:
    plugins, heard = PluginManager(), Silence()
    plugins.register(heard)
    (host,) = farm.plant(single(), a=[["0"]])
    session = farm.outsource(single(), plugins=plugins)
    check(session)
    assert heard.told == []
    host.crash()
    with thread(lambda: check(session)) as waiting:
        while session.pool.workers[0].failures < 2:
            time.sleep(0.01)
        host.restart()
        waiting.result(SECONDS)
    check(session)
    assert heard.told == [("silent", "a", "a: nothing answers there"), ("back", "a")]
    assert 0 < heard.left[0] <= SECONDS
    host.on("evaluate", lambda request: error_message("busy", "later"))
    check(session)
    assert len(heard.told) == 2, "one that is busy answers"


def test_gone_for_good(farm: Farm) -> None:
    model = attention()
    farm.plant(model, a=[QKV], b=[["o_proj"]])
    session = farm.outsource(model, deadline=0.3)
    farm.hosts["a"].crash()
    with pytest.raises(TransportTimeoutError) as caught:
        model(X)
    text = str(caught.value)
    assert "q_proj + k_proj + v_proj (forward) had no answer within 0.3" in text
    assert "a: nothing answers there" in text
    assert session.traffic.requests == 0
    farm.hosts["a"].restart()
    model(X)
    assert session.traffic.requests == 2


def test_all_replicas_gone_are_all_named(farm: Farm) -> None:
    session, first, second = both(farm, deadline=0.3)
    first.crash()
    second.on("evaluate", never, always=True)
    with pytest.raises(TransportTimeoutError, match=r"0 \(forward\).*a: nothing answers there; b: "):
        product(session)


def test_a_worker_that_hangs_is_left_for_its_replica(farm: Farm) -> None:
    session, first, second = both(farm, timeout=0.1)
    gate = Gate(first)
    first.on("evaluate", gate)
    check(session)
    assert (first.count("evaluate"), second.count("evaluate"), session.traffic.retries) == (1, 1, 1)
    assert not first.pending, "the late request was given up"
    gate.open.set()
    check(session)


def test_a_late_answer_of_the_only_worker_is_asked_for_again(farm: Farm) -> None:
    session, host = alone(farm, timeout=0.1)
    host.on("evaluate", never, never)
    check(session)
    assert (host.count("evaluate"), session.traffic.retries) == (3, 2)


def test_a_worker_that_hangs_ends_at_the_deadline(farm: Farm) -> None:
    session, host = alone(farm, timeout=60, deadline=0.3)
    host.on("evaluate", never, always=True)
    with (
        thread(lambda: product(session)) as waiting,
        pytest.raises(TransportTimeoutError, match="had no answer within 0.3"),
    ):
        waiting.result(SECONDS)
    assert not host.pending


def test_opening_again_ends_at_the_deadline_too(farm: Farm) -> None:
    session, host = alone(farm, timeout=60, deadline=0.3)
    host.restart()
    host.on("open", never, always=True)
    with (
        thread(lambda: product(session)) as waiting,
        pytest.raises(TransportTimeoutError, match="had no answer within"),
    ):
        waiting.result(SECONDS)
    assert not host.pending


def test_one_hanging_opening_is_waited_for_once(farm: Farm) -> None:
    session, first, second = both(farm, timeout=0.3)
    first.restart()
    with ThreadPoolExecutor(8) as pool:
        first.on("open", never, always=True)
        session.pool.workers[0].session = None
        list(pool.map(lambda _: check(session), range(8)))
    # One for the session that was lost, one that everybody waited for, at most one after the first back-off.
    assert first.count("open") <= 3
    assert second.count("evaluate") == 8


def test_an_opening_that_fails_is_not_repeated_by_everybody(farm: Farm) -> None:
    session, host = alone(farm, deadline=1)

    def fail(request: Message) -> Message:
        time.sleep(0.02)  # Long enough for all to queue.
        return error_message("busy", "not now")

    host.restart()
    host.on("open", fail, always=True)
    session.pool.workers[0].session = None
    with ThreadPoolExecutor(8) as pool:
        products = [pool.submit(product, session) for _ in range(8)]
    assert all(isinstance(done.exception(), TransportTimeoutError) for done in products)
    assert 3 <= host.count("open") < 40


def test_a_reply_is_good_however_late_it_is_asked_for(farm: Farm) -> None:
    session, host = alone(farm, deadline=0.2, timeout=0.1)
    (piece,) = session.pool.pieces(0)
    call = PendingRequest(session.pool, piece, "forward", session.pool.opening, {"x": FLAT}, lambda reply: None)
    end = time.monotonic() + SECONDS
    while host.pending and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.25)
    assert call.result().kind == "ok"
    assert call.attempts == 1


def test_a_hedge_answers_first(farm: Farm) -> None:
    session, first, second = both(farm, hedge=0.05, timeout=60)
    first.on("evaluate", never)
    check(session)
    assert (first.count("evaluate"), second.count("evaluate"), session.traffic.retries) == (1, 1, 1)
    assert not first.pending, "the loser was given up"


def test_the_hedged_worker_answers_first(farm: Farm) -> None:
    session, first, second = both(farm, hedge=0.05, timeout=60)
    gate = Gate(first)

    def open_the_gate(request: Message) -> None:
        gate.open.set()

    first.on("evaluate", gate)
    second.on("evaluate", open_the_gate)
    check(session)
    assert (first.count("evaluate"), second.count("evaluate"), session.traffic.retries) == (1, 1, 1)
    assert not second.pending


def test_nothing_is_hedged_that_is_answered_soon(farm: Farm) -> None:
    session, first, second = both(farm, hedge=10)
    for _ in range(4):
        check(session)
    assert first.count("evaluate") + second.count("evaluate") == 4


def test_a_hedge_does_not_wait_for_a_session(farm: Farm) -> None:
    session, first, second = both(farm, hedge=0.02, timeout=60)
    gate = Gate(first)
    first.on("evaluate", gate)
    second.on("open", never, always=True)
    session.pool.workers[1].session = None
    opened = second.count("open")
    with thread(lambda: check(session)) as done:
        # Both are idle and never failed; the one that was used longer ago comes first.
        session.pool.workers[1].last_used = time.monotonic()
        if gate.reached.wait(SECONDS):
            time.sleep(0.1)
            gate.open.set()
        done.result(SECONDS)
    assert second.count("open") == opened


class Keyed(ClearBackend):
    """Brings a key of 1 MiB, and products that may take long."""

    name = "keyed"

    class Client(ClearClient):
        def evaluation_key(self) -> dict[str, Tensor]:
            return {"key": torch.zeros(1 << 20, dtype=torch.uint8)}

    def client(self, device: torch.device) -> ClearClient:
        return self.Client()

    def allowance(self, linear_map: Any, tokens: int) -> float:
        return 0.001 * tokens * linear_map.out_features


def later(host: Host, seconds: float) -> Any:
    def script(request: Message) -> Message:
        time.sleep(seconds)
        return host.answer(request)

    return script


def test_a_large_key_may_take_longer_than_a_request(
    farm: Farm, register: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Watcher:
        seen: ClassVar[list[Any]] = []

        @ciphertune.hookspecs.hookimpl
        def ciphertune_sending_key(self, worker: str, nbytes: int, done: bool) -> None:
            self.seen.append((worker, nbytes, done))

    register(registry.BACKENDS, Keyed)
    plugins = PluginManager()
    plugins.register(Watcher(), "watcher")
    model = single()
    (a,) = farm.plant(model, a=[["0"]])
    a.on("open", later(a, 0.3))
    with caplog.at_level(logging.INFO, "ciphertune.client"):
        session = farm.outsource(model, "keyed", plugins, timeout=0.1, connect_timeout=0.05)
    assert a.count("open") == 1
    assert Watcher.seen == [("a", 1 << 20, False), ("a", 1 << 20, True)]
    assert "sending a key of 1.0 MB to a" in caplog.text
    assert session.traffic.requests == 0


def test_a_slow_product_has_the_time_that_the_backend_says(farm: Farm, register: Any) -> None:
    register(registry.BACKENDS, Keyed)
    model = single()
    (a,) = farm.plant(model, a=[["0"]])
    session = farm.outsource(model, "keyed", timeout=0.1)
    a.on("evaluate", later(a, 0.4))
    model(torch.ones(5, 24))  # 5 · 192 ms beyond the timeout
    assert (a.count("evaluate"), session.traffic.retries) == (1, 0)
    a.on("evaluate", later(a, 0.6))
    model(torch.ones(1, 24))
    assert session.traffic.retries >= 1


def test_busy_is_tried_again(farm: Farm) -> None:
    session, host = alone(farm)
    host.on("evaluate", fail_with("busy"), fail_with("busy"))
    check(session)
    assert session.traffic.retries == 2
    assert host.count("open") == 1


def test_busy_for_too_long(farm: Farm) -> None:
    session, host = alone(farm, deadline=0.3)
    host.on("evaluate", fail_with("busy", "the queue is full"), always=True)
    with pytest.raises(TransportTimeoutError, match="a: the queue is full"):
        product(session)
    assert 2 <= host.count("evaluate") < 20, "less and less often"


def test_other_weights_after_a_restart_are_not_used(farm: Farm) -> None:
    session, host = alone(farm, deadline=0.4)
    other = single()
    other[0].weight.data += 1  # type: ignore[assignment]
    host.restart(farming.store(other, None, [["0"]]))
    with pytest.raises(TransportTimeoutError, match="does not hold what it held"):
        product(session)
    assert host.worker.sessions == 0
    host.restart()
    check(session)


def test_a_replica_does_what_other_weights_cannot(farm: Farm) -> None:
    session, first, second = both(farm)
    other = single()
    other[0].weight.data += 1  # type: ignore[assignment]
    first.restart(farming.store(other, None, [["0"]]))
    for _ in range(4):
        check(session)
    assert second.count("evaluate") == 4


@pytest.mark.parametrize("code", ["protocol", "version", "unknown-layer", "plugin", "quota", "something new"])
def test_what_will_fail_again_is_raised_at_once(farm: Farm, code: str) -> None:
    session, first, second = both(farm)
    first.on("evaluate", fail_with(code, "no and no"))
    with pytest.raises(WorkerError, match="a refused a request of kind 'evaluate': no and no") as caught:
        product(session)
    assert caught.value.code == code
    assert second.count("evaluate") == 0
    check(session)


def test_a_full_worker_is_not_the_end_of_a_session_that_it_forgot(farm: Farm) -> None:
    session, host = alone(farm)
    host.restart()
    # Openings whose answers were lost count there until they run out.
    host.on("open", fail_with("quota", "no more sessions"), fail_with("quota", "no more sessions"))
    check(session)
    assert host.count("open") == 4
    session.pool.timeouts = Timeouts(deadline=0.3)
    host.restart()
    host.on("open", fail_with("quota", "no more sessions"), always=True)
    with pytest.raises(TransportTimeoutError, match="no more sessions"):
        product(session)


def test_what_one_worker_stumbles_over_its_replica_may_not(farm: Farm) -> None:
    session, first, second = both(farm)
    first.on("evaluate", fail_with("internal"))
    check(session)
    assert session.traffic.retries == 1
    for host in (first, second):
        host.on("evaluate", fail_with("internal", "no memory"), always=True)
    time.sleep(0.1)
    with pytest.raises(WorkerError, match="no memory"):
        product(session)


@pytest.mark.parametrize(
    "error", [TransportError("cut"), TransportTimeoutError("late"), OSError("gone"), KeyError("x")]
)
def test_whatever_the_link_fails_with_a_replica_is_used(
    farm: Farm, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    session, first, second = both(farm)
    first.on("evaluate", raising(error))
    check(session)
    assert (first.count("evaluate"), second.count("evaluate"), session.traffic.retries) == (1, 1, 1)


def test_a_link_that_raises_instead_of_failing(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    session, first, second = both(farm)
    monkeypatch.setattr(first, "take", lambda request: raising(RuntimeError("0.123456"))(request))
    for _ in range(3):
        check(session)
    assert second.count("evaluate") == 3
    second.crash()
    session.pool.timeouts = Timeouts(deadline=0.3)
    with pytest.raises(TransportTimeoutError, match="a: the transport failed: RuntimeError") as caught:
        product(session)
    assert "0.123456" not in str(caught.value)


@pytest.mark.parametrize("reply", [Message("hello"), Message("ok"), Message("ok", {}, {"y": torch.zeros(3, 3)})])
def test_nonsense_is_not_repeated_and_the_rest_is_given_up(farm: Farm, reply: Message) -> None:
    model = single()
    first, second = farm.plant(model, a=[[("0", 0, 64)]], b=[[("0", 64, None)]])
    session = farm.outsource(model)
    first.on("evaluate", lambda request: reply)
    second.on("evaluate", never)
    with pytest.raises(ReplyError):
        product(session)
    assert not second.pending
    assert [host.count("evaluate") for host in (first, second)] == [1, 1]
    check(session)


def test_closing_while_a_product_waits(farm: Farm) -> None:
    session, host = alone(farm)
    reached = threading.Event()
    host.on("evaluate", lambda request: reached.set())
    with thread(lambda: product(session)) as waiting:
        assert reached.wait(SECONDS)
        session.close()
        with pytest.raises(TransportError, match="closed"):
            waiting.result(SECONDS)
    assert (host.worker.sessions, host.closed) == (0, 1)


def test_closing_while_a_session_is_opened_again(farm: Farm) -> None:
    session, host = alone(farm)
    gate = Gate(host)
    host.restart()
    host.on("open", gate)
    with thread(lambda: product(session)) as waiting:
        assert gate.reached.wait(SECONDS)
        with thread(session.close):
            end = time.monotonic() + SECONDS
            while not session.pool.closed.is_set() and time.monotonic() < end:
                time.sleep(0.01)
            gate.open.set()
        with pytest.raises(TransportError, match="closed"):
            waiting.result(SECONDS)


def test_a_session_that_is_opened_while_closing_is_closed_too(farm: Farm) -> None:
    session, first, second = both(farm)
    gate = Gate(first)
    first.restart()
    first.on("open", gate)
    # While this answer is waited for, the other worker's comes.
    second.on("close", lambda request: gate.open.set())
    session.pool.workers[0].session = None
    with thread(lambda: product(session)) as waiting:
        assert gate.reached.wait(SECONDS)
        session.close()
        with pytest.raises(TransportError, match="closed"):
            waiting.result(SECONDS)
    assert first.worker.sessions == 0


def test_closing_in_the_back_off(farm: Farm) -> None:
    session, host = alone(farm)
    host.crash()
    with thread(lambda: product(session)) as waiting:
        end = time.monotonic() + SECONDS
        while not session.pool.workers[0].failures and time.monotonic() < end:
            time.sleep(0.01)
        session.close()
        with pytest.raises(TransportError, match="closed"):
            waiting.result(SECONDS)


@pytest.mark.parametrize("state", ["gone", "hanging", "raising"])
def test_closing_at_dead_workers(farm: Farm, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    session, first, second = both(farm)
    session.pool.timeouts = Timeouts(timeout=0.1)
    if state == "gone":
        first.crash()
    elif state == "hanging":
        first.on("close", never, always=True)
    else:
        monkeypatch.setattr(first, "take", raising(RuntimeError("no")))
    with thread(session.close) as done:
        done.result(SECONDS)
    assert (first.closed, second.closed, second.worker.sessions) == (1, 1, 0)
    session.close()
    assert first.closed == 1


@pytest.mark.slow
def test_many_threads_at_workers_that_come_and_go(farm: Farm) -> None:
    model = single()
    farm.plant(model, a=[[("0", 0, 64)]], b=[[("0", 64, None)]], d=[[("0", 64, None)]])
    session = farm.outsource(model, hedge=0.05, timeout=0.2)
    stop = threading.Event()
    chance = random.Random(0)

    def moody(request: Message) -> Message | None:
        mood = chance.random() if request.kind == "evaluate" else 1
        if mood < 0.05:
            return None
        return error_message("busy", "not now") if mood < 0.2 else farm.hosts["a"].answer(request)

    farm.hosts["a"].script = moody

    def disturb() -> None:
        turns = 0
        while not stop.wait(0.03):
            host = farm.hosts["bd"[turns % 2]]
            if host.up:
                host.crash()
            else:
                host.restart()
            if turns % 5 == 0:
                farm.hosts["a"].restart()
            turns += 1

    with thread(disturb) as disturbing:
        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: check(session), range(80)))
        finally:
            stop.set()
        disturbing.result(SECONDS)
    assert session.traffic.requests == 160
    assert session.traffic.retries > 0
    for host in farm.hosts.values():
        host.script = host.answer
        host.up = True
    check(session)


def test_a_replica_that_is_down_at_the_start(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    model = single()
    first, second = farm.plant(model, a=[["0"]], b=[["0"]])
    first.up = False
    with caplog.at_level(logging.WARNING, "ciphertune"):
        session = farm.outsource(model, connect_timeout=0.2)
    assert "no answer from a, going on without it: a: nothing answers there" in caplog.text
    check(session)
    assert second.count("evaluate") == 1


def test_a_needed_worker_that_is_down_at_the_start(farm: Farm) -> None:
    model = attention()
    first, second = farm.plant(model, a=[QKV], b=[["o_proj"]])
    second.up = False
    with pytest.raises(TransportError) as caught:
        farm.outsource(model, connect_timeout=0.2)
    text = str(caught.value)
    assert "no answer within 0.2 s from b (b: nothing answers there)" in text
    assert "o_proj: no worker has it" in text
    assert isinstance(model.o_proj, nn.Linear)
    assert not ciphertune.outsourced_layers(model)
    assert (first.worker.sessions, first.closed, second.closed) == (0, 1, 1)


def test_layers_that_nobody_holds_are_named_at_once(farm: Farm) -> None:
    model = attention()
    farm.plant(model, a=[QKV[:2]], b=[["o_proj"]])
    with pytest.raises(UnknownLayerError, match=r"workers \(a, b\) .*v_proj: no worker has it"):
        farm.outsource(model)


@pytest.mark.parametrize("kind", ["hello", "manifest"])
def test_a_worker_that_hangs_at_the_start_spoils_no_other(
    farm: Farm, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = single()
    first, second = farm.plant(model, a=[["0"]], b=[["0"]])
    first.on(kind, never, always=True)

    def slow(request: Message) -> Message:
        time.sleep(0.3)
        return second.answer(request)

    second.on("manifest", slow)
    with caplog.at_level(logging.WARNING, "ciphertune"):
        session = farm.outsource(model, connect_timeout=1)
    assert "no answer from a" in caplog.text
    assert not first.pending
    check(session)


@pytest.mark.parametrize("kind", ["hello", "manifest", "open"])
def test_a_message_that_is_lost_at_the_start_is_sent_again(farm: Farm, kind: str) -> None:
    """After ``timeout``, as any request."""
    model = single()
    (host,) = farm.plant(model, a=[["0"]])
    host.on(kind, never, never)
    check(farm.outsource(model, timeout=0.1))
    assert host.count(kind) == 3


def test_a_worker_that_comes_up_late_is_waited_for(farm: Farm) -> None:
    model = single()
    (host,) = farm.plant(model, a=[["0"]])
    host.up = False
    timer = threading.Timer(0.2, host.restart)
    timer.start()
    check(farm.outsource(model))
    timer.join()


@pytest.mark.parametrize("kind", ["hello", "manifest", "open"])
def test_busy_at_the_start_is_tried_again(farm: Farm, kind: str) -> None:
    model = single()
    (host,) = farm.plant(model, a=[["0"]])
    host.on(kind, fail_with("busy"), raising(TransportError("cut")), raising(OSError("odd")))
    check(farm.outsource(model))


def test_a_replica_that_dies_while_sessions_are_opened(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    model = single()
    first, second = farm.plant(model, a=[["0"]], b=[["0"]])
    first.on("open", first.crash)
    with caplog.at_level(logging.WARNING, "ciphertune"):
        session = farm.outsource(model, connect_timeout=0.2)
    assert "no session at a, going on without it" in caplog.text
    check(session)
    first.restart()
    time.sleep(0.1)
    gate = Gate(second)
    second.on("evaluate", gate)
    with thread(lambda: check(session)) as done:
        assert gate.reached.wait(SECONDS)
        check(session)
        assert first.count("evaluate") == 1, "it is used when it is back"
        gate.open.set()
        done.result(SECONDS)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to client halves."""
    seen: list[str] = []

    def client(self: ClearBackend, device: torch.device) -> ClearClient:
        seen.append("made")
        half = ClearClient()
        half.close = lambda: seen.append("closed")  # type: ignore[method-assign]
        return half

    monkeypatch.setattr(ClearBackend, "client", client)
    return seen


START_FAILURES: dict[str, tuple[str, farming.Script, type[Exception], str]] = {
    "no hello": ("hello", never, TransportError, "no answer within 0.2 s from b"),
    "refused hello": ("hello", fail_with("version", "too old"), WorkerError, "b refused .* 'hello': too old"),
    "hello without versions": ("hello", lambda _: Message("ok"), ReplyError, "b: .* does not say which protocol"),
    "hello without holdings": (
        "hello",
        lambda _: Message("ok", {"versions": spoken_versions()}),
        ReplyError,
        "b sent .* 'holdings'",
    ),
    "hello of another kind": ("hello", lambda _: Message("stats"), ReplyError, "b answered a 'hello'"),
    "no manifest": ("manifest", never, TransportError, "no answer within 0.2 s from b"),
    "an empty manifest": ("manifest", lambda _: Message("ok", {"blocks": []}), UnknownLayerError, "o_proj: no worker"),
    "a malformed manifest": ("manifest", lambda _: Message("ok", {"blocks": [[{}]]}), ReplyError, "b: a manifest row"),
    "a refused opening": ("open", fail_with("quota", "enough"), WorkerError, "b refused .* 'open': enough"),
    "no opening": ("open", never, TransportError, "b: no session could be opened for o_proj: no answer within"),
    "a lost opening": ("open", raising(TransportError("cut")), TransportError, "b: no session .* o_proj: cut"),
    "other holdings": ("open", fail_with("holdings", "moved"), TransportError, "b: no session .* o_proj: moved"),
    "a session without a name": ("open", lambda _: Message("ok", {"session": 7}), ReplyError, "b sent .* 'session'"),
}


@pytest.mark.parametrize("failure", START_FAILURES)
def test_a_failure_at_the_start_leaves_nothing_behind(farm: Farm, halves: list[str], failure: str) -> None:
    kind, script, error, text = START_FAILURES[failure]
    model = attention()
    first, second = farm.plant(model, a=[QKV], b=[["o_proj"]])
    second.on(kind, script, always=True)
    with pytest.raises(error, match=text):
        farm.outsource(model, connect_timeout=0.2, timeout=0.2)
    assert not ciphertune.outsourced_layers(model)
    assert first.count("open") == first.count("close") == (kind == "open")
    assert (first.worker.sessions, first.closed, second.closed) == (0, 1, 1)
    assert halves == ["made", "closed"]


def test_links_that_cannot_even_be_made(farm: Farm, halves: list[str]) -> None:
    model = single()
    with pytest.raises(KeyError):
        ciphertune.outsource(model, farm.selection().replace("farm://", "farm://nowhere"))
    assert halves == ["made", "closed"]


def test_a_link_that_fails_to_close_keeps_no_other_open(
    farm: Farm, halves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attention()
    first, second = farm.plant(model, a=[QKV], b=[["o_proj"]])
    close = farming.HostLink.close

    def closing(link: farming.HostLink) -> None:
        close(link)
        raise OSError("no")

    monkeypatch.setattr(farming.HostLink, "close", closing)
    second.on("open", fail_with("quota"))
    with pytest.raises(OSError, match="no"):
        farm.outsource(model)
    assert (first.closed, second.closed, halves) == (1, 1, ["made", "closed"])


def test_weights_of_two_workers_make_one_layer_only_if_they_are_of_it(farm: Farm) -> None:
    model = single()
    farm.plant(model, a=[[("0", 0, 64)]])
    other = single()
    other[0].weight.data[100] += 0.01
    farm.plant(other, b=[[("0", 64, None)]])
    with pytest.raises(UnknownLayerError, match="b holds another weight"):
        farm.outsource(model)


def test_a_store_of_parts_is_what_was_cut() -> None:
    model = single()
    held = farming.store(model, 8, [[("0", 64, 128)]])
    weight = quantize(model[0].weight, 8)  # type: ignore[arg-type]
    assert weight.scale is not None
    part = LayerWeight(held["0"], weight.scale[64:128])
    assert torch.equal(part.dequantize(), weight.dequantize()[64:128])


@pytest.mark.parametrize("option", ["timeout=0", "deadline=-1", "hedge=-0.1", "connect_timeout=nan", "deadline=inf"])
def test_times_must_make_sense(option: str) -> None:
    with pytest.raises(SelectionError, match=option.partition("=")[0]):
        ciphertune.outsource(single(), f"mlwe?{option}")
