"""A network that is as bad as it is told to be, around any other transport."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune.errors import SelectionError, TransportError
from ciphertune.protocol import Message
from ciphertune.testing import ServedWorker, TransportSuite, WrappingSuite
from ciphertune.transport import Link
from ciphertune_flaky import FlakyOptions
from ciphertune_flaky.later import Later
from ciphertune_flaky.link import FlakyLink


class TestFlaky(WrappingSuite):
    name = "flaky"


class TestFlakyAndLate(WrappingSuite):
    name = "flaky"
    options = "latency=0.005&jitter=0.005"


@pytest.mark.slow
class TestFlakyZmq(TransportSuite):
    name = "flaky::zmq"
    options = "insecure=1&latency=0.001"


class Answering(Link):
    """Answers at once, and counts."""

    name = "answering"

    def __init__(self) -> None:
        self.count = 0
        self.hold = False

    def submit(self, request: Message) -> Future[Message]:
        self.count += 1
        future: Future[Message] = Future()
        if not self.hold:
            future.set_result(Message("ok", {"n": self.count}))
        return future

    def close(self) -> None:
        pass


def fates(link: FlakyLink, count: int) -> str:
    """Of requests that come one after another: answered, never, failed."""
    found = ""
    for _ in range(count):
        reply = link.submit(Message("hello"))
        if not reply.done():
            found += "-"
        else:
            found += "x" if reply.exception() is not None else "."
    link.close()
    return found


def test_losses_and_drops_are_as_often_as_asked_for() -> None:
    inner = Answering()
    found = fates(FlakyLink(inner, FlakyOptions(loss=0.2, drops=0.1, flaky_seed=1)), 4000)
    assert abs(found.count("x") / 4000 - 0.1) < 0.03
    # A drop fails requests that were lost and under way, but takes nothing from those that come.
    assert abs(found.count("-") / 4000 - 0.9 * 0.2) < 0.03
    lost = 0.9 * 0.2
    assert abs(inner.count / 4000 - (0.9 - lost / 2)) < 0.03, "half of what is lost has been evaluated"


def test_a_seed_decides() -> None:
    options = FlakyOptions(loss=0.3, drops=0.2, flaky_seed=5)
    first, again = (fates(FlakyLink(Answering(), options), 200) for _ in range(2))
    assert first == again
    other = FlakyOptions(loss=0.3, drops=0.2, flaky_seed=6)
    assert fates(FlakyLink(Answering(), other), 200) != first
    free = FlakyOptions(loss=0.3, drops=0.2)
    assert len({fates(FlakyLink(Answering(), free), 200) for _ in range(3)}) == 3


def test_a_drop_fails_what_is_under_way_and_lasts() -> None:
    inner = Answering()
    inner.hold = True
    link = FlakyLink(inner, FlakyOptions(drops=0.5, down=1000, flaky_seed=0))
    waiting = []
    while all(not each.done() for each in waiting):
        waiting.append(link.submit(Message("hello")))
    for each in waiting:
        with pytest.raises(TransportError, match="answering: the connection was lost"):
            each.result(0)
    sent = inner.count
    with pytest.raises(TransportError):
        link.submit(Message("hello")).result(0)
    assert inner.count == sent, "nothing is sent while the connection is down"
    link.close()


def test_replies_come_late_in_the_order_of_their_time() -> None:
    link = FlakyLink(Answering(), FlakyOptions(latency=0.05))
    begun = time.monotonic()
    replies = [link.submit(Message("hello")) for _ in range(20)]
    assert not any(each.done() for each in replies)
    assert [each.result(30).fields["n"] for each in replies] == list(range(1, 21))
    assert time.monotonic() - begun >= 0.05
    link.close()


def test_a_late_reply_to_a_closed_or_cancelled_request_is_dropped() -> None:
    link = FlakyLink(Answering(), FlakyOptions(latency=0.01))
    given_up, closed = link.submit(Message("hello")), link.submit(Message("hello"))
    assert given_up.cancel()
    link.close()
    with pytest.raises(TransportError, match="closed"):
        closed.result(0)
    assert not [each for each in threading.enumerate() if each.name == "ciphertune-flaky"]


def test_things_are_done_later_in_turn() -> None:
    later, done, enough = Later(), [], threading.Event()
    later.do(0.02, lambda: done.append("second"))
    later.do(0.01, lambda: done.append("first"))
    later.do(0, lambda: done.append("at once"))
    later.do(0.03, enough.set)
    assert enough.wait(30)
    assert done == ["at once", "first", "second"]
    # Closing on the thread itself does not wait for it.
    closed = threading.Event()

    def close() -> None:
        later.close()
        closed.set()

    later.do(0.001, close)
    assert closed.wait(30)
    later.do(0.001, lambda: done.append("never"))
    later.close()
    assert "never" not in done


@pytest.mark.parametrize(
    "option", ["latency=-1", "jitter=nan", "down=inf", "loss=1.1", "drops=-0.1", "loss=often", "flaky_seed=x"]
)
def test_options_that_are_none(option: str) -> None:
    with pytest.raises(SelectionError, match=option.partition("=")[0]):
        ciphertune.outsource(nn.Sequential(nn.Linear(2, 2)), f"mlwe+flaky::local://?{option}", "all")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.linspace(-1, 1, 30).reshape(5, 6)


def test_a_setup_that_stands_a_bad_network(tmp_path: Path) -> None:
    """Results are those of a good one; what was lost was sent again, from the first message on."""
    expected = ciphertune.outsource(network(), "clear?weight_bits=8", "all")(X).detach()
    with ServedWorker(network(), "flaky::zmq", tmp_path, options="insecure=1") as served:
        to = served.selection("clear", allow_insecure=1, weight_bits=8, loss=0.2, drops=0.1, flaky_seed=3, timeout=0.2)
        model = ciphertune.outsource(network(), to, "all")
        session = ciphertune.session_of(model)
        for _ in range(10):
            assert torch.equal(model(X).detach(), expected)
        assert session.traffic.retries > 0
        session.close()


def test_two_around_one_transport() -> None:
    """Each has options of its own; those of the inner one carry its name."""
    to = "clear+flaky::flaky::local://?latency=0.01&flaky_latency=0.02&loss=0&flaky_jitter=0.001"
    model = ciphertune.outsource(network(), to, "all")
    transport = ciphertune.session_of(model).choice.transport
    assert transport.options == FlakyOptions(latency=0.01)
    assert transport.inner.options == FlakyOptions(latency=0.02, jitter=0.001)  # type: ignore[attr-defined]
    begun = time.monotonic()
    model(X)
    assert time.monotonic() - begun >= 2 * 0.03
    ciphertune.session_of(model).close()
