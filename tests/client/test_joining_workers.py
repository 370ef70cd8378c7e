"""Workers that join while a session is open."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from farm import SECONDS, Farm, Host, never
from torch import Tensor, nn

from ciphertune.client.session import Session
from ciphertune.errors import TransportError
from ciphertune.transport import Link


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 32)
        self.k_proj = nn.Linear(24, 16, bias=False)
        self.v_proj = nn.Linear(24, 8)
        self.o_proj = nn.Linear(56, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).tanh())


WHOLE = (("q_proj", "k_proj", "v_proj"), ("o_proj",))


@pytest.fixture
def farm(register: Any) -> Iterator[Farm]:
    made = Farm(register, elastic=True)
    yield made
    made.close()


@pytest.fixture
def base() -> Attention:
    torch.manual_seed(0)
    return Attention()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def products(host: Host) -> int:
    return host.count("evaluate")


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x.grad = None
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def outsource(farm: Farm, base: nn.Module) -> tuple[nn.Module, Session]:
    model = copy.deepcopy(base)
    return model, farm.outsource(model, weight_bits=8)


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.allclose(one, other, atol=1e-5) for one, other in zip(some, others, strict=True))


def test_a_worker_that_comes_takes_its_share(farm: Farm, base: Attention, x: Tensor) -> None:
    (first,) = farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    model, _ = outsource(farm, base)
    before = step(model, x)
    alone = products(first)
    assert alone == 4
    (second,) = farm.serve(second=first.held)
    until(lambda: second.count("open") == 1)
    for _ in range(4):
        assert same(step(model, x), before)
    assert products(second) >= 4
    assert products(first) + products(second) == alone + 4 * alone
    assert first.count("open") == 1, "a session was opened anew though its worker is asked for what it was"


def test_three_workers_where_there_was_one_survive_the_first(farm: Farm, base: Attention, x: Tensor) -> None:
    (first,) = farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    model, _ = outsource(farm, base)
    before = step(model, x)
    others = farm.serve(second=first.held, third=first.held)
    until(lambda: all(host.count("open") == 1 for host in others))
    first.crash()
    assert same(step(model, x), before)


def test_pieces_that_change_under_an_old_worker(farm: Farm, base: Attention, x: Tensor) -> None:
    """It gets a session that knows the new pieces as well, and the old one is closed."""
    (first,) = farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    model, _ = outsource(farm, base)
    before = step(model, x)
    farm.plant(base, "clear?weight_bits=8", second=[["q_proj"]])
    until(lambda: farm.hosts["second"].count("open") == 1)
    for _ in range(3):
        assert same(step(model, x), before)
    assert products(farm.hosts["second"]) > 0
    assert first.count("open") == 2
    until(lambda: first.worker.sessions == 1)


def test_what_is_under_way_while_a_session_is_replaced(farm: Farm, base: Attention, x: Tensor) -> None:
    """The old session is gone when the answer is due: the request is sent again in the new one."""
    (first,) = farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    model, _ = outsource(farm, base)
    before = step(model, x)

    def late(request: Any) -> Any:
        farm.plant(base, "clear?weight_bits=8", second=[["q_proj"]])
        until(lambda: farm.hosts["second"].count("open") == 1)
        # Another thread of the client has asked for one of the new pieces meanwhile.
        first.worker.handle(type(request)("close", {"session": request.fields["session"]}), "client")
        return first.answer(request)

    first.on("evaluate", late)
    assert same(step(model, x), before)


def test_one_that_does_not_answer_is_asked_again(
    farm: Farm, base: Attention, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    model = copy.deepcopy(base)
    farm.outsource(model, weight_bits=8, connect_timeout=0.2)
    before = step(model, x)
    host = Host("second", first.held, farm.threads)
    host.on("hello", never, always=True)
    farm.hosts["second"] = host
    until(lambda: host.closed > 0)
    assert same(step(model, x), before)
    host.script = host.answer
    until(lambda: host.count("open") == 1)
    assert "no answer from second" in caplog.text


def test_a_question_that_fails_stops_nothing(
    farm: Farm, base: Attention, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fail(self: Any, endpoints: tuple[str, ...], links: Sequence[Link]) -> list[Link]:
        asked.append(1)
        raise (TransportError("the cluster is away") if len(asked) % 2 else KeyError("a private thing"))

    monkeypatch.setattr(farm.transport, "joining_workers", fail)
    farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    model, _ = outsource(farm, base)
    until(lambda: len(asked) > 3)
    step(model, x)
    assert "the cluster is away" in caplog.text
    assert "private" not in caplog.text


def test_no_question_after_the_end(farm: Farm, base: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(farm.transport, "joining_workers", lambda *_: asked.append(1) or [])
    farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    _, session = outsource(farm, base)
    until(lambda: bool(asked))
    session.close()
    time.sleep(0.05)
    count = len(asked)
    time.sleep(0.2)
    assert len(asked) == count


def test_nobody_is_looked_for_where_none_come(register: Any, base: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = Farm(register)
    monkeypatch.setattr(farm.transport, "joining_workers", lambda *_: pytest.fail("it was asked"))
    farm.plant(base, "clear?weight_bits=8", first=WHOLE)
    outsource(farm, base)
    time.sleep(0.1)
    farm.close()
