"""A worker open to many clients: quotas, turns, expiry, draining, and whatever bytes they send."""

from __future__ import annotations

import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from inbox import Inbox

from ciphertune._support.turns import turn_seconds
from ciphertune.client.choice import choose
from ciphertune.protocol import Limits, Message, pack
from ciphertune.weights import describe, group_map, quantize
from ciphertune.worker import Quota, Service, SessionLimits, WeightStore, Worker
from ciphertune.worker.metrics import Monitor

WEIGHT = quantize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 8)


class Scripted(Worker):
    """Takes as long as a request says, and remembers whose turn it was."""

    def __init__(self) -> None:
        super().__init__(WeightStore.of({"a": WEIGHT}), limits=SessionLimits(idle_seconds=0.2))
        self.turns: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun, self.resume = threading.Event(), threading.Event()
        self.answers: list[Message] = []

    def handle(self, request: Message, peer: str = "", pause: Callable[[], object] | None = None) -> Message:
        if request.kind != "evaluate":
            return super().handle(request, peer)
        self.gate.wait(60)
        for _ in range(int(request.fields.get("pauses", 0))):
            self.begun.set()
            self.resume.wait(60)
            assert pause is not None
            pause()
        self.turns.append(peer)
        if self.answers:
            return self.answers.pop()
        time.sleep(float(request.fields.get("cost", 0)))
        return Message("ok", {}, {"y": torch.zeros(int(request.fields.get("size", 0)), dtype=torch.uint8)})


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, Service]]:
    worker = Scripted()
    service = Service(worker, Quota(requests=60, nbytes=100_000))
    yield worker, service
    worker.gate.set()
    service.close()
    service.close()


def ask(service: Service, peer: str, inbox: Inbox, kind: str = "evaluate", nbytes: int = 0, **fields: Any) -> None:
    service.submit(pack(Message(kind, fields, {"x": torch.zeros(nbytes, dtype=torch.uint8)})), peer, inbox.take)


def test_one_request_waits_for_one_product_of_another_client(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    many, one = Inbox(), Inbox()
    worker.gate.clear()
    for _ in range(50):
        ask(service, "many", many, cost=0.001)
    ask(service, "one", one, cost=0.001)
    worker.gate.set()
    many.wait(50)
    one.wait(1)
    assert worker.turns.index("one") <= 1


def test_evaluation_time_is_shared_evenly(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    heavy, light = Inbox(), Inbox()
    worker.gate.clear()
    for _ in range(10):
        ask(service, "heavy", heavy, cost=0.04)
    for _ in range(40):
        ask(service, "light", light, cost=0.01)
    worker.gate.set()
    heavy.wait(10)
    # While both waited, each got about half of the time: four light products for a heavy one.
    before_last_heavy = worker.turns[: len(worker.turns) - worker.turns[::-1].index("heavy")]
    assert 18 <= before_last_heavy.count("light") <= 40
    light.wait(40)


def test_small_products_are_evaluated_in_the_pauses_of_a_large_one(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    inboxes = {peer: Inbox() for peer in ("large", "small", "middle")}
    ask(service, "small", inboxes["small"])
    inboxes["small"].wait(1)
    worker.turns.clear()
    ask(service, "large", inboxes["large"], nbytes=40_000, pauses=2, cost=0.01)
    assert worker.begun.wait(60)
    ask(service, "large", inboxes["large"])
    ask(service, "middle", inboxes["middle"], nbytes=20_000)
    ask(service, "small", inboxes["small"], cost=0.01)
    # Who used more time so far is not let in between.
    time.sleep(2 * (service.status("small").own.evaluate_seconds or 0.0))
    worker.resume.set()
    assert inboxes["small"].wait(2)[1].kind == "ok"
    for peer, count in (("large", 2), ("middle", 1)):
        assert [message.kind for message in inboxes[peer].wait(count)] == ["ok"] * count
    # One of half the size waits for its turn, and so does another one of the same client.
    assert worker.turns[:2] == ["small", "large"]
    spent = {peer: service.status(peer).own.evaluate_seconds or 0.0 for peer in inboxes}
    assert spent["small"] >= 0.01
    assert service.counters.evaluate_seconds == pytest.approx(sum(spent.values()))
    assert service.load.under_way == 0
    assert service.drain(5)


class Short:
    """A service of real products, which remembers on which threads they were evaluated.

    Attributes:
        gate: where products wait.
        gates: where those of some clients wait instead.
        now: seconds, by the clock of a fixture that stops it.
    """

    def __init__(self, worker: Worker, service: Service) -> None:
        self.worker, self.service = worker, service
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.gates: dict[str, threading.Event] = {}
        self.now = 0.0
        handle = worker.handle

        def watched(request: Message, peer: str = "", *rest: Any) -> Message:
            if request.kind == "evaluate":
                self.threads.append(threading.current_thread().name)
                self.gates.get(peer, self.gate).wait(60)
            return handle(request, peer, *rest)

        worker.handle = watched  # type: ignore[method-assign, assignment]

    def open(self, peer: str) -> str:
        reply = self.worker.handle(Message("open", {"backend": "mlwe", "public": {}, "groups": [["a"]]}), peer)
        assert reply.kind == "ok", reply.fields
        return str(reply.fields["session"])

    def ask(self, peer: str, session: str, inbox: Inbox, idle: bool = True, tokens: int = 1) -> None:
        fields = {"session": session, "group": 0, "direction": "forward"}
        b = torch.ones(WEIGHT.codes.shape[1], 3, tokens, dtype=torch.uint8)
        self.service.submit(pack(Message("evaluate", fields, {"b": b})), peer, inbox.take, idle=idle)

    def wait(self, count: int) -> None:
        """Until so many products have begun."""
        end = time.monotonic() + 60
        while len(self.threads) < count and time.monotonic() < end:
            time.sleep(0.01)
        assert len(self.threads) == count


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Short]:
    # However long this machine takes.
    monkeypatch.setattr("ciphertune.worker.worker._SHORT_SECONDS", 60.0)
    worker = Worker(WeightStore.of({"a": WEIGHT}))
    made = Short(worker, Service(worker, Quota(requests=3, nbytes=100_000)))
    yield made
    made.gate.set()
    assert made.service.close(60)


def in_background(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, name="listener")
    thread.start()
    return thread


def test_a_short_product_is_evaluated_where_it_came(short: Short) -> None:
    session, inbox, here = short.open("me"), Inbox(), threading.current_thread().name
    short.ask("me", session, inbox)  # of which nobody knows how long it takes
    inbox.wait(1)
    short.ask("me", session, inbox)
    short.ask("me", session, inbox, idle=False)
    replies = inbox.wait(3)
    assert short.threads == ["ciphertune-evaluate-0", here, "ciphertune-evaluate-0"]
    assert torch.equal(replies[0].buffers["y"], replies[1].buffers["y"])
    own = short.service.status("me").own
    assert (own.products, own.errors, own.under_way) == (3, 0, 0)
    assert own.evaluate_seconds > 0
    assert short.service.counters.queue_seconds > 0
    assert short.service.drain(5)
    short.ask("me", session, inbox)
    assert inbox.wait(4)[3].fields["code"] == "busy"
    assert len(short.threads) == 3


def test_a_product_that_took_longer_is_evaluated_elsewhere(short: Short, monkeypatch: pytest.MonkeyPatch) -> None:
    session, inbox = short.open("me"), Inbox()
    for count in range(1, 3):
        short.ask("me", session, inbox)
        inbox.wait(count)
    monkeypatch.setattr("ciphertune.worker.worker._SHORT_SECONDS", 0.0)
    for count in range(3, 6):
        short.ask("me", session, inbox)
        inbox.wait(count)
    here = threading.current_thread().name
    assert short.threads == ["ciphertune-evaluate-0", here, here, *["ciphertune-evaluate-0"] * 2]


def test_a_short_product_waits_for_its_turn_where_others_wait(short: Short) -> None:
    sessions = {peer: short.open(peer) for peer in ("one", "two")}
    inboxes = {peer: Inbox() for peer in sessions}
    for peer, session in sessions.items():
        short.ask(peer, session, inboxes[peer])
        inboxes[peer].wait(1)
    short.threads.clear()
    short.gate.clear()
    listener = in_background(lambda: short.ask("one", sessions["one"], inboxes["one"]))
    short.wait(1)
    # One evaluator: while the listener's thread is it, no other thread evaluates, nor this one, and quotas hold.
    for _ in range(3):
        short.ask("one", sessions["one"], inboxes["one"])
    short.ask("two", sessions["two"], inboxes["two"])
    assert inboxes["one"].wait(2)[1].fields["code"] == "busy"
    assert (short.service.load.queued, short.service.load.under_way) == (3, 4)
    assert short.threads == ["listener"]
    short.gate.set()
    listener.join(60)
    assert [message.kind for message in inboxes["one"].wait(5)[2:]] == ["ok"] * 3
    assert inboxes["two"].wait(2)[1].kind == "ok"
    # What waited for one layer was evaluated at once, on the evaluator's thread.
    assert short.service.counters.joined == 3
    assert short.threads == ["listener"]
    assert short.service.load.under_way == 0


@pytest.fixture
def beside(short: Short, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Short, dict[str, str], dict[str, Inbox]]]:
    """A service whose evaluator is busy with a large product of 100 tokens.

    It knows products of a token as short, and of the client "other" those of 50.
    """
    short.now = time.monotonic()
    monkeypatch.setattr(short.service, "_clock", lambda: short.now)
    sessions = {peer: short.open(peer) for peer in ("large", "small", "other")}
    inboxes = {peer: Inbox() for peer in sessions}
    for peer, session in sessions.items():
        short.ask(peer, session, inboxes[peer], tokens=50 if peer == "other" else 1)
        inboxes[peer].wait(1)
    short.threads.clear()
    short.gates["large"] = threading.Event()
    short.ask("large", sessions["large"], inboxes["large"], tokens=100)
    short.wait(1)
    yield short, sessions, inboxes
    short.gates["large"].set()


def test_a_short_product_is_evaluated_beside_a_larger_one(
    beside: tuple[Short, dict[str, str], dict[str, Inbox]],
) -> None:
    short, sessions, inboxes = beside
    for count in (2, 3):
        short.ask("small", sessions["small"], inboxes["small"])
        assert inboxes["small"].wait(count)[-1].kind == "ok"
    here = threading.current_thread().name
    assert short.threads == ["ciphertune-evaluate-0", here, here]
    assert short.service.load.under_way == 1
    assert not inboxes["large"].messages[1:]
    short.gates["large"].set()
    assert inboxes["large"].wait(2)[1].kind == "ok"
    assert short.service.drain(5)


def test_time_beside_a_larger_product_is_counted_once(
    beside: tuple[Short, dict[str, str], dict[str, Inbox]],
) -> None:
    short, sessions, inboxes = beside

    def spent() -> dict[str, float]:
        return {peer: short.service.status(peer).own.evaluate_seconds or 0.0 for peer in sessions}

    before = spent()
    short.now += 5.0
    short.gate.clear()
    listener = in_background(lambda: short.ask("small", sessions["small"], inboxes["small"]))
    short.wait(2)
    short.now += 3.0
    short.gate.set()
    listener.join(60)
    short.now += 1.0
    short.gates["large"].set()
    inboxes["large"].wait(2)
    assert short.service.drain(5)
    gained = {peer: seconds - before[peer] for peer, seconds in spent().items()}
    assert gained == pytest.approx({"large": 6.0, "small": 3.0, "other": 0.0})
    assert short.service.counters.evaluate_seconds == pytest.approx(sum(spent().values()))


@pytest.mark.parametrize(
    "why", ["it is its own", "others arrived", "it is no smaller", "more time used", "one is there"]
)
def test_what_is_not_evaluated_beside_a_larger_product(
    beside: tuple[Short, dict[str, str], dict[str, Inbox]], why: str
) -> None:
    short, sessions, inboxes = beside
    peer = {"it is its own": "large", "it is no smaller": "other"}.get(why, "small")
    if why == "more time used":
        short.service._products.client("small", 0.0).virtual_time += 10.0
    if why == "one is there":
        short.gate.clear()
        listener = in_background(lambda: short.ask("other", sessions["other"], inboxes["other"]))
        short.wait(2)
    begun = len(short.threads)
    tokens = 50 if why == "it is no smaller" else 1
    short.ask(peer, sessions[peer], inboxes[peer], idle=why != "others arrived", tokens=tokens)
    assert len(short.threads) == begun
    assert short.service.load.queued == 1
    short.gate.set()
    short.gates["large"].set()
    inboxes["large"].wait(2)
    assert inboxes[peer].wait(3 if peer == "large" else 2)[-1].kind == "ok"
    assert short.threads[begun:] == ["ciphertune-evaluate-0"]
    if why == "one is there":
        listener.join(60)


def test_closing_waits_for_products_on_threads_of_the_listener(short: Short) -> None:
    session, inbox = short.open("me"), Inbox()
    short.ask("me", session, inbox)
    inbox.wait(1)
    short.gate.clear()
    listener = in_background(lambda: short.ask("me", session, inbox))
    short.wait(2)
    assert not short.service.close(0.05)
    short.gate.set()
    assert short.service.close(60)
    listener.join(60)
    assert len(inbox.wait(2)) == 2


def test_who_used_more_time_is_not_let_in_between(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    large, small = Inbox(), Inbox()
    worker.gate.clear()
    ask(service, "small", small, cost=0.5)
    ask(service, "small", small)
    ask(service, "large", large, nbytes=40_000, pauses=1)
    worker.resume.set()
    worker.gate.set()
    large.wait(1)
    small.wait(2)
    assert worker.turns == ["small", "large", "small"]


def test_requests_beyond_the_quota_are_told_to_come_back(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    inbox, other = Inbox(), Inbox()
    worker.gate.clear()
    for _ in range(61):
        ask(service, "greedy", inbox)
    (refused,) = inbox.wait(1)
    assert (refused.kind, refused.fields["code"]) == ("error", "busy")
    assert "60 requests" in refused.fields["message"]
    ask(service, "modest", other)
    worker.gate.set()
    assert other.wait(1)[0].kind == "ok"
    assert [m.kind for m in inbox.wait(61)].count("error") == 1
    ask(service, "greedy", inbox)
    assert inbox.wait(62)[-1].kind == "ok", "what was answered is no longer counted"


def test_bytes_beyond_the_quota_count_replies_that_were_not_taken(scripted: tuple[Scripted, Service]) -> None:
    _, service = scripted
    inbox = Inbox()
    inbox.keep = True
    ask(service, "slow", inbox, nbytes=150_000)
    assert inbox.wait(1)[0].kind == "ok", "a single request is taken, however large"
    inbox.releases[0]()
    ask(service, "slow", inbox, size=90_000)
    assert inbox.wait(2)[1].kind == "ok"
    ask(service, "slow", inbox, nbytes=20_000)
    assert inbox.wait(3)[2].fields["code"] == "busy"
    assert service.load.nbytes > 90_000
    inbox.releases[1]()
    inbox.releases[1]()
    assert service.load.nbytes == 0
    ask(service, "slow", inbox, nbytes=20_000)
    assert inbox.wait(4)[3].kind == "ok"


def test_control_requests_do_not_wait_for_products(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    products, control = Inbox(), Inbox()
    worker.gate.clear()
    ask(service, "a", products)
    for kind in ("hello", "manifest", "stats", "close"):
        ask(service, "b", control, kind)
    assert sorted(message.kind for message in control.wait(4)) == ["error", "ok", "ok", "ok"]
    assert products.messages == []
    worker.gate.set()
    products.wait(1)


def test_draining_finishes_and_refuses(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    inbox = Inbox()
    inbox.keep = True
    worker.gate.clear()
    ask(service, "a", inbox)
    assert not service.drain(0.05), "a product is under way"
    ask(service, "a", inbox)
    assert inbox.wait(1)[0].fields["code"] == "busy"
    worker.gate.set()
    inbox.wait(2)
    assert not service.drain(0.05), "its reply has not left"
    inbox.releases[1]()
    assert service.drain(5)


def test_idle_sessions_and_clients_are_forgotten(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    inbox = Inbox()
    ask(service, "a", inbox, "open", backend="clear", groups=[["a"]], public={})
    assert inbox.wait(1)[0].kind == "ok"
    assert (service.load.sessions, service.load.clients) == (1, 1)
    end = time.monotonic() + 60
    while (service.load.sessions or service.load.clients) and time.monotonic() < end:
        time.sleep(0.05)
    assert (service.load.sessions, service.load.clients, service.counters.expired) == (0, 0, 1)
    assert worker.sessions == 0


def test_a_reply_that_cannot_travel(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    inbox = Inbox()
    worker.answers.append(Message("ok", {}, {"y": torch.zeros(2, dtype=torch.float16)}))
    ask(service, "a", inbox)
    assert inbox.wait(1)[0].fields["code"] == "internal"
    ask(service, "a", inbox)
    assert inbox.wait(2)[1].kind == "ok"
    assert service.load.under_way == 0


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([], "protocol"),
        ([b""], "protocol"),
        ([b"\xc1"], "protocol"),
        ([b"x" * 5000], "protocol"),
        ([pack(Message("hello"))[0].replace(b"\xa1v\x01", b"\xa1v\x63")], "version"),  # type: ignore[union-attr]
        ([*pack(Message("hello")), b"more"], "protocol"),
        ([*pack(Message("evaluate", {}, {"x": torch.zeros(5000, dtype=torch.uint8)}))], "protocol"),
    ],
    ids=range(7),
)
def test_malformed_messages_get_an_error(frames: list[Any], code: str) -> None:
    service = Service(Worker(WeightStore()), limits=Limits(header_bytes=4000, buffer_bytes=4000, total_bytes=4000))
    try:
        inbox = Inbox()
        service.submit(frames, "a", inbox.take)
        assert inbox.wait(1)[0].fields["code"] == code
        assert service.load.under_way == 0
    finally:
        service.close()


@pytest.fixture(scope="module")
def serving() -> Iterator[Service]:
    service = Service(Worker(WeightStore.of({"a": WEIGHT}), limits=SessionLimits(sessions=10**6, all_sessions=10**6)))
    yield service
    service.close()


def call(service: Service, message: Message | list[Any]) -> Message:
    inbox = Inbox()
    service.submit(pack(message) if isinstance(message, Message) else message, "fuzz", inbox.take)
    return inbox.wait(1)[0]


@settings(max_examples=300)
@given(st.data())
def test_mutated_messages_harm_nobody(serving: Service, data: st.DataObject) -> None:
    backend = choose(data.draw(st.sampled_from(["clear?weight_bits=8", "mlwe", "simulation"]))).backend
    linear_map = group_map([describe("a", WEIGHT)], "forward")
    client = backend.client(torch.device("cpu"))
    preparation = client.preparation(linear_map, group_map([describe("a", WEIGHT)], "backward"))
    if preparation is not None:
        preparation.absorb(0, WEIGHT.codes)
        preparation.finish()
    opening = Message("open", {"backend": backend.name, "groups": [["a"]], "public": dict(client.open_fields())})
    session = call(serving, opening).fields["session"]
    x = torch.randn(3, 4)
    encrypted = client.encrypt(x, linear_map)
    good = Message("evaluate", {"session": session, "group": 0, "direction": "forward"}, encrypted.buffers)
    frames = [bytearray(frame) for frame in pack(data.draw(st.sampled_from([good, opening])))]
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(rng.randint(1, 6)):
        frame = rng.choice(frames)
        action = rng.randrange(5)
        if action == 0 and frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        elif action == 1:
            del frame[rng.randrange(len(frame) + 1) :]
        elif action == 2:
            frame.extend(rng.randbytes(rng.randrange(50)))
        elif action == 3 and len(frames) > 1:
            frames.pop(rng.randrange(len(frames)))
        else:
            frames.insert(rng.randrange(len(frames) + 1), bytearray(rng.randbytes(rng.randrange(80))))
    assert call(serving, list(frames)).kind in ("ok", "error")
    reply = call(serving, good)
    if reply.kind == "ok":  # The mutation may have been a valid 'close'.
        y = client.decrypt(reply.buffers, encrypted.state, linear_map)
        expected = x @ WEIGHT.codes.float().t()
        assert float((y - expected).norm() / expected.norm()) < 0.05
    assert serving.load.under_way == 0


def status(monitor: Monitor, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{monitor.port}/{path}", timeout=60) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_metrics_and_health_over_http(scripted: tuple[Scripted, Service]) -> None:
    worker, service = scripted
    inbox = Inbox()
    for _ in range(3):
        ask(service, "a", inbox, size=1000)
    ask(service, "a", inbox, "open", backend="clear", groups=[["a"]], public={})
    ask(service, "a", inbox, "close", session="none")
    inbox.wait(5)
    monitor = Monitor("127.0.0.1", 0)
    try:
        assert [status(monitor, path) for path in ("live", "ready", "metrics", "other")] == [200, 503, 503, 404]
        monitor.open(service)
        assert [status(monitor, path) for path in ("live", "ready", "other")] == [200, 200, 404]
        with urllib.request.urlopen(f"http://127.0.0.1:{monitor.port}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        service.drain(0)
        assert [status(monitor, path) for path in ("live", "ready", "metrics")] == [200, 503, 200]
        service.close()
        assert status(monitor, "live") == 503, "its threads have ended"
    finally:
        monitor.close()
    values = dict(re.findall(r"^(ciphertune_\S+) (\S+)$", text, re.M))
    assert float(values['ciphertune_requests_total{kind="evaluate"}']) == 3
    assert float(values['ciphertune_errors_total{code="unknown-session"}']) == 1
    assert float(values['ciphertune_bytes_total{direction="out"}']) > 3000
    assert float(values["ciphertune_sessions"]) == 1
    assert float(values["ciphertune_layers"]) == 1
    assert float(values["ciphertune_weight_bytes"]) == worker.weights.nbytes == 24
    assert float(values['ciphertune_seconds_total{phase="evaluate"}']) > 0
    assert re.search(r"^process_resident_memory_bytes \d", text, re.M)


def test_threads_that_evaluate_take_long_turns() -> None:
    """Any other thread that wakes up is to have the processor at once: see ``take_turns``."""
    if turn_seconds() == 0.0:
        pytest.skip("this system has one length of turns for all threads")
    turns: list[float] = []
    worker = Scripted()
    handle = worker.handle

    def watched(*given: Any) -> Message:
        turns.append(turn_seconds())
        return handle(*given)

    worker.handle = watched  # type: ignore[method-assign, assignment]
    service, inbox = Service(worker), Inbox()
    ask(service, "me", inbox)
    inbox.wait(1)
    assert service.close(60)
    assert turns[0] > turn_seconds()
