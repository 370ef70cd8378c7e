"""Several workers behind one session: what comes back is what one worker would have given."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune import registry, session_of
from ciphertune.bundle import load_worker
from ciphertune.errors import SelectionError, TransportError, TransportTimeoutError, WorkerError
from ciphertune.protocol import Message, error_message
from ciphertune.transport import Handler, Link, Transport
from ciphertune.weights import WeightStore
from ciphertune.worker import Worker

CLEAR = "clear+fake://{}?weight_bits=8&allow_insecure=1"


class Attention(nn.Module):
    """Siblings that share an input, wide enough to be cut by rows, and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 192), nn.Linear(24, 128), nn.Linear(24, 128)
        self.out = nn.Linear(192, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        y: torch.Tensor = self.out(q * torch.cat([k, v], dim=1)[:, :192])
        return y


class Machine:
    """A worker that can be told to misbehave."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.worker = Worker(store)
        self.requests: list[Message] = []
        self.up = True
        self.delay = 0.0
        self.answers: list[Any] = []

    def restart(self) -> None:
        self.worker, self.up = Worker(self.store), True

    def answer(self, request: Message) -> Message:
        if request.kind == "evaluate":
            self.requests.append(request)
            if self.answers:
                answer = self.answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, Message):
                    return answer
                answer()
        if not self.up:
            raise TransportError("the machine is down")
        return self.worker.handle(request)


class FakeLink(Link):
    def __init__(self, name: str, machine: Machine) -> None:
        self.name, self.machine = name, machine

    def submit(self, request: Message) -> Future[Message]:
        future: Future[Message] = Future()

        def run() -> None:
            time.sleep(self.machine.delay)
            try:
                outcome: Any = self.machine.answer(request)
            except Exception as error:
                outcome = error
            with contextlib.suppress(Exception):
                (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)

        if self.machine.delay:
            threading.Thread(target=run, daemon=True).start()
        else:
            run()
        return future

    def close(self) -> None:
        pass


class Fake(Transport):
    name = "fake"
    Options = registry.load(registry.TRANSPORTS, "local").Options
    machines: dict[str, Machine]

    def connect(self, endpoints: tuple[str, ...], worker: Handler | None) -> Sequence[Link]:
        return [FakeLink(name, self.machines[name]) for name in endpoints]


@pytest.fixture
def fleet(register: Any, tmp_path: Path) -> Iterator[Any]:
    """``fleet(shards=…, by=…, replicas=…)``: machines over a split model, by name."""
    register(registry.TRANSPORTS, Fake)

    def start(**options: Any) -> dict[str, Machine]:
        torch.manual_seed(0)
        result = ciphertune.split(Attention(), tmp_path / "bundle", **options)
        machines = {f"m{i}": Machine(load_worker(folder)) for i, folder in enumerate(result.workers)}
        Fake.machines = machines
        return machines

    return start


def reference() -> Attention:
    torch.manual_seed(0)
    return Attention()


def both(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, 10)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def connected(machines: dict[str, Machine], to: str = CLEAR, extra: str = "") -> nn.Module:
    return ciphertune.outsource(reference(), to.format(",".join(machines)) + extra)


@pytest.mark.parametrize("to", [CLEAR, "mlwe+fake://{}"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shards": 2},
        {"shards": 2, "by": "rows"},
        {"shards": 3, "by": "rows"},
        {"replicas": 2},
    ],
    ids=str,
)
def test_however_the_layers_are_spread(fleet: Any, options: dict[str, Any], to: str) -> None:
    machines = fleet(**options)
    model = connected(machines, to)
    found, expected = both(model), both(ciphertune.outsource(reference(), "clear?weight_bits=8"))
    tolerance = 1e-5 if to == CLEAR else 2e-2
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance
    assert all(machine.requests for machine in machines.values())
    traffic = session_of(model).traffic
    assert traffic.requests == sum(len(machine.requests) for machine in machines.values())
    if options == {}:
        assert traffic.requests == 4, "q, k and v are one product each way"


def test_parts_of_replicas_and_whole_ones_mix(fleet: Any) -> None:
    machines = fleet(shards=2, by="rows")
    machines["copy"] = Machine(machines["m1"].store)
    whole = both(connected(machines))
    machines["m1"].up = False
    for a, b in zip(both(connected(machines, extra="&connect_timeout=0.2")), whole, strict=True):
        assert torch.equal(a, b)
    assert machines["copy"].requests


def test_replicas_share_the_load(fleet: Any) -> None:
    machines = fleet(replicas=3)
    model = connected(machines)
    for _ in range(6):
        both(model)
    counts = [len(machine.requests) for machine in machines.values()]
    assert sum(counts) == 24
    assert max(counts) - min(counts) <= 1


def test_a_replica_takes_over_and_nothing_is_done_twice(fleet: Any) -> None:
    machines = fleet(replicas=2)
    expected = both(connected(machines))
    model = connected(machines)
    machines["m0"].answers = [TransportError("cut"), TransportError("cut again")]
    found = both(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    traffic = session_of(model).traffic
    assert traffic.requests == 4
    assert 1 <= traffic.retries <= 2


def test_the_only_worker_restarts(fleet: Any) -> None:
    machines = fleet()
    expected = both(connected(machines))
    model = connected(machines)

    def crash() -> None:
        machines["m0"].up = False
        threading.Timer(0.3, machines["m0"].restart).start()

    machines["m0"].answers = [lambda: None, crash]
    assert all(torch.equal(a, b) for a, b in zip(both(model), expected, strict=True))
    assert session_of(model).traffic.retries >= 1


def test_gone_for_good(fleet: Any) -> None:
    machines = fleet()
    model = connected(machines, extra="&deadline=0.4")
    machines["m0"].up = False
    begun = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"q_proj \+ k_proj \+ v_proj \(forward\).*m0: the machine is down"):
        both(model)
    assert 0.3 < time.monotonic() - begun < 5


def test_late_answers_are_asked_for_again(fleet: Any) -> None:
    machines = fleet(replicas=2)
    expected = both(connected(machines))
    model = connected(machines, extra="&timeout=0.1")
    machines["m0"].delay = 1.0
    assert all(torch.equal(a, b) for a, b in zip(both(model), expected, strict=True))
    assert session_of(model).traffic.retries >= 1


def test_hedging_asks_a_replica_before_the_timeout(fleet: Any) -> None:
    machines = fleet(replicas=2)
    model = connected(machines, extra="&hedge=0.05&timeout=30")
    machines["m0"].delay = 3.0
    begun = time.monotonic()
    both(model)
    assert time.monotonic() - begun < 10
    assert session_of(model).traffic.retries >= 1


def test_a_busy_worker_is_asked_again(fleet: Any) -> None:
    machines = fleet()
    model = connected(machines)
    machines["m0"].answers = [error_message("busy", "shutting down")] * 3
    both(model)
    assert session_of(model).traffic.retries == 3


def test_a_worker_that_comes_back_with_other_weights_is_not_used(fleet: Any) -> None:
    machines = fleet()
    model = connected(machines, extra="&deadline=0.5")
    torch.manual_seed(99)
    other = Attention()
    codes = ciphertune.outsource(copy.deepcopy(other), "clear?weight_bits=8")
    machines["m0"].store = session_of(codes).worker.weights  # type: ignore[union-attr]
    machines["m0"].restart()
    with pytest.raises(TransportTimeoutError, match="does not hold what it held"):
        both(model)


def test_what_one_worker_stumbles_over_a_replica_may_not(fleet: Any) -> None:
    machines = fleet(replicas=2)
    model = connected(machines)
    machines["m0"].answers = [error_message("internal", "KeyError")]
    both(model)
    machines["m0"].answers = [error_message("internal", "KeyError")] * 9
    machines["m1"].answers = [error_message("internal", "KeyError")] * 9
    with pytest.raises(WorkerError, match="KeyError"):
        both(model)


def test_a_refusal_for_good_is_raised_at_once(fleet: Any) -> None:
    machines = fleet(replicas=2)
    model = connected(machines)
    machines["m0"].answers = machines["m1"].answers = [error_message("protocol", "no such unit")]
    with pytest.raises(WorkerError, match=r"m\d refused .*no such unit"):
        both(model)
    assert sum(worker.in_flight for worker in session_of(model)._fleet._workers) == 0


def test_a_replica_that_is_down_at_the_start_is_left_out(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    machines = fleet(replicas=2)
    machines["m1"].up = False
    with caplog.at_level(logging.WARNING):
        both(connected(machines, extra="&connect_timeout=0.2"))
    assert "no answer from m1, going on without it: the machine is down" in caplog.text


def test_a_worker_that_is_needed_at_the_start(fleet: Any) -> None:
    machines = fleet(shards=2)
    machines["m1"].up = False
    model = reference()
    with pytest.raises(TransportError, match=r"m1 \(the machine is down\).*do not hold") as failure:
        ciphertune.outsource(model, CLEAR.format("m0,m1") + "&connect_timeout=0.2")
    assert "out: no worker has it" in str(failure.value)
    assert type(model.q_proj) is nn.Linear


def test_many_threads(fleet: Any) -> None:
    machines = fleet(replicas=2)
    model = connected(machines)
    expected = both(model)
    wrong: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            x = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
            session = session_of(model)
            for _ in range(20):
                y = session.product(0, "forward", x)
                if y.shape != (7, 448):
                    wrong.append(y.shape)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert all(torch.equal(a, b) for a, b in zip(both(model), expected, strict=True))
    assert [worker.in_flight for worker in session_of(model)._fleet._workers] == [0, 0]


def test_closing_does_not_wait_for_the_dead(fleet: Any) -> None:
    machines = fleet(replicas=2)
    model = connected(machines)
    machines["m0"].up = False
    machines["m1"].delay = 30.0
    begun = time.monotonic()
    session_of(model).close()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("option", ["timeout=0", "deadline=-1", "hedge=-0.1", "connect_timeout=nan", "deadline=inf"])
def test_times_must_make_sense(option: str) -> None:
    with pytest.raises(SelectionError, match=option.partition("=")[0]):
        ciphertune.outsource(reference(), f"mlwe?{option}")
