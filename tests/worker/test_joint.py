"""Products of several clients that are evaluated at once: the same answers, each to whoever asked, and faults alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inbox import Inbox

from ciphertune.backend import Buffers, Direction
from ciphertune.protocol import Message, pack
from ciphertune.weights import describe, quantize
from ciphertune.worker import Quota, Service, WeightStore, Worker
from ciphertune_mlwe.worker import PANEL, MLWEWorker

OUT, FEATURES = 40, 24


def store() -> WeightStore:
    """q and k, one below the other."""
    held = {
        name: quantize(torch.randn(OUT, FEATURES, generator=torch.Generator().manual_seed(i)), 8)
        for i, name in enumerate(("q", "k"))
    }
    made = WeightStore()
    made.add([describe(name, each).shard() for name, each in held.items()], torch.cat([w.codes for w in held.values()]))
    return made


class Held:
    """A service whose evaluator is kept busy until all that a test asks for waits."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.service = Service(worker, Quota(requests=60, nbytes=1 << 20))
        self.together: list[int] = []
        self._gate = threading.Event()
        self._begun = threading.Event()
        evaluate = MLWEWorker.evaluate_together

        def watched(half: Any, prepared: Any, direction: Direction, requests: Any) -> list[Buffers]:
            self.together.append(len(requests))
            return evaluate(half, prepared, direction, requests)

        self.watched = watched
        handle = worker.handle

        def gated(request: Message, peer: str = "", *rest: Any) -> Message:
            if peer == "blocker" and request.kind == "evaluate":
                self._begun.set()
                self._gate.wait(60)
            return handle(request, peer, *rest)

        worker.handle = gated  # type: ignore[method-assign, assignment]
        self._inbox = Inbox()
        self.submit("blocker", self._inbox, "none", 0, torch.zeros(1))
        assert self._begun.wait(60)

    def submit(self, peer: str, inbox: Inbox, session: str, group: int, b: Any, direction: str = "forward") -> None:
        fields = {"session": session, "group": group, "direction": direction}
        self.service.submit(pack(Message("evaluate", fields, {"b": b})), peer, inbox.take)

    def release(self) -> None:
        self._gate.set()

    def open(self, peer: str) -> str:
        fields = {"backend": "mlwe", "public": {}, "groups": [["q", "k"], ["q"], ["k"]]}
        reply = self.worker.handle(Message("open", fields), peer)
        assert reply.kind == "ok", reply.fields
        return str(reply.fields["session"])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(Worker(store()))
    monkeypatch.setattr(MLWEWorker, "evaluate_together", made.watched)
    yield made
    made.release()
    made.service.close()


def values(tokens: int, seed: int, planes: int = 3, features: int = FEATURES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (features, planes, tokens), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("direction", "features"), [("forward", 2 * FEATURES), ("backward", 2 * OUT)])
def test_requests_of_many_clients_that_wait_are_evaluated_at_once(held: Held, direction: str, features: int) -> None:
    features = FEATURES if direction == "forward" else features
    asked = []
    for index in range(PANEL):
        peer = f"client{index}"
        asked.append((peer, held.open(peer), values(1, index, features=features), Inbox()))
    for peer, session, b, inbox in asked:
        held.submit(peer, inbox, session, 0, b, direction)
    alone = [
        held.worker.handle(Message("evaluate", {"session": s, "group": 0, "direction": direction}, {"b": b}), peer)
        for peer, s, b, _ in asked
    ]
    held.release()
    for (peer, _, _, inbox), expected in zip(asked, alone, strict=True):
        (found,) = inbox.wait(1)
        assert torch.equal(found.buffers["y"], expected.buffers["y"])
        own = held.service.status(peer).own
        assert (own.products, own.errors, own.under_way) == (1, 0, 0)
        assert own.evaluate_seconds > 0
    assert held.together == [PANEL]
    assert held.service.counters.joined == PANEL


def test_what_differs_is_not_evaluated_together(held: Held) -> None:
    first, second = held.open("a"), held.open("b")
    asked = [
        ("a", first, 0, values(2, 0), "forward"),
        ("b", second, 1, values(2, 1), "forward"),
        ("b", second, 0, values(2, 2, planes=4), "forward"),
        ("b", second, 0, values(2, 3, features=2 * OUT), "backward"),
        ("b", second, 0, values(PANEL - 1, 4), "forward"),
        ("b", second, 0, values(PANEL + 1, 5), "forward"),
    ]
    inboxes = [Inbox() for _ in asked]
    for (peer, session, group, b, direction), inbox in zip(asked, inboxes, strict=True):
        held.submit(peer, inbox, session, group, b, direction)
    held.release()
    assert [inbox.wait(1)[0].kind for inbox in inboxes] == ["ok"] * len(asked)
    assert held.together == []


def test_bad_requests_fail_alone(held: Held) -> None:
    sessions = {peer: held.open(peer) for peer in "abcd"}
    good = values(2, 0)
    asked: list[tuple[str, str, Any, str]] = [
        ("a", sessions["a"], good, "ok"),
        ("b", sessions["b"], values(2, 1, features=FEATURES + 1), "protocol"),
        ("c", sessions["a"], good, "unknown-session"),
        ("d", sessions["d"], good.float(), "protocol"),
        ("d", sessions["d"], good, "ok"),
    ]
    inboxes = [Inbox() for _ in asked]
    for (peer, session, b, _), inbox in zip(asked, inboxes, strict=True):
        held.submit(peer, inbox, session, 0, b)
    held.release()
    found = [inbox.wait(1)[0] for inbox in inboxes]
    assert [reply.fields.get("code", "ok") for reply in found] == [each[3] for each in asked]
    assert torch.equal(found[0].buffers["y"], found[4].buffers["y"])


@pytest.mark.parametrize("fault", ["raises", "one answer too few", "a session that ended"])
def test_where_it_fails_each_is_answered_by_itself(held: Held, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(half: Any, prepared: Any, direction: Direction, requests: list[Buffers]) -> list[Buffers]:
        if fault == "raises":
            raise RuntimeError("broken")
        return held.watched(half, prepared, direction, requests)[1:]

    if fault != "a session that ended":
        monkeypatch.setattr(MLWEWorker, "evaluate_together", failing)
    sessions = {peer: held.open(peer) for peer in "abc"}
    inboxes = {peer: Inbox() for peer in sessions}
    for peer, session in sessions.items():
        held.submit(peer, inboxes[peer], session, 0, values(1, ord(peer)))
    if fault == "a session that ended":
        held.worker.dismiss("b")
    held.release()
    codes = {peer: inbox.wait(1)[0].fields.get("code", "ok") for peer, inbox in inboxes.items()}
    ended = "unknown-session" if fault == "a session that ended" else "ok"
    assert codes == {"a": "ok", "b": ended, "c": "ok"}


def test_a_session_that_ends_meanwhile_is_kept_until_its_product_is_there(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Callable[[], None]] = []
    monkeypatch.setattr(MLWEWorker, "close", lambda half: closed.append(half))
    sessions = {peer: held.open(peer) for peer in "ab"}

    def ending(half: Any, prepared: Any, direction: Direction, requests: Any) -> list[Buffers]:
        held.worker.dismiss("a")
        assert closed == []
        return held.watched(half, prepared, direction, requests)

    monkeypatch.setattr(MLWEWorker, "evaluate_together", ending)
    inboxes = [Inbox(), Inbox()]
    for (peer, session), inbox in zip(sessions.items(), inboxes, strict=True):
        held.submit(peer, inbox, session, 0, values(1, 0))
    held.release()
    assert [inbox.wait(1)[0].kind for inbox in inboxes] == ["ok", "ok"]
    assert len(closed) == 1
