"""``ciphertune top``, and what workers tell of themselves: enough to see their load, no more of other clients."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import remote
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import ciphertune
from ciphertune.bundle.writer import split
from ciphertune.cli import cli
from ciphertune.cli.top import screen
from ciphertune.client.monitor import Watch, WorkerState, transport_of
from ciphertune.errors import SelectionError, TransportError
from ciphertune.protocol import Message, pack, spoken_versions, unpack
from ciphertune.status import ClientUsage, WorkerStatus
from ciphertune.transport import Link, LocalWorker, Transport
from ciphertune.weights import quantize
from ciphertune.worker import Service, WeightStore, Worker
from ciphertune.worker.counters import Load
from ciphertune.worker.disclosure import Disclosure, Totals

WEIGHT = quantize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 8)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[remote.WorkerProcess]]:
    """Two workers that hold the same layers."""
    folder = tmp_path_factory.mktemp("farm")
    torch.manual_seed(0)
    split(nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)), folder / "bundle", layers="all")
    with remote.worker(folder / "bundle" / "worker") as a, remote.worker(folder / "bundle" / "worker") as b:
        yield [a, b]


def model_at(*workers: remote.WorkerProcess) -> nn.Sequential:
    torch.manual_seed(0)
    addresses = ",".join(worker.address for worker in workers)
    network = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    return ciphertune.outsource(network, f"mlwe+zmq://{addresses}?insecure=1", "all")


def once(url: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    done = CliRunner().invoke(cli, ["top", url, "--once", "--json", *arguments], catch_exceptions=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    return done.exit_code, json.loads(lines[0])["workers"]


NUMBERS = {
    *("layers", "weight_bytes", "evaluators", "uptime_seconds", "busy", "sessions", "clients", "queued", "under_way"),
    *("bytes_in_per_second", "bytes_out_per_second", "latency"),
}
TEXTS = {"worker", "state", "problem", "version", "device"}
OWN = {"sessions", "under_way", "products", "errors", "bytes_in", "bytes_out", "evaluate_seconds"}


@pytest.mark.slow
@pytest.mark.xdist_group("monitor")
def test_json_of_real_workers(farm: list[remote.WorkerProcess]) -> None:
    nobody = f"127.0.0.1:{remote.free_port()}"
    model = model_at(farm[0])
    session = ciphertune.session_of(model)
    try:
        for _ in range(3):
            model(torch.randn(5, 24))
        url = f"zmq://{farm[0].address},{farm[1].address},{nobody}?insecure=1"
        status, rows = once(url)
        assert status == 1
        assert [row["worker"] for row in rows] == [farm[0].address, farm[1].address, nobody]
        for row in rows:
            assert set(row) == NUMBERS | {
                "worker",
                "state",
                "problem",
                "version",
                "device",
                "own",
                "products_per_second",
                "excluded",
            }
            assert set(row["own"]) == OWN
        for row in rows[:2]:
            assert row["state"] == "up"
            assert all(isinstance(row[name], (int, float)) for name in NUMBERS)
            assert (row["version"], row["device"], row["layers"]) == (ciphertune.__version__, "cpu", 2)
            assert row["weight_bytes"] == 24 * 16 + 16 * 8
            assert 0 <= row["busy"] <= 1
        assert rows[2]["state"] == "silent"
        assert rows[2]["problem"] == "nothing answers there"
        assert all(rows[2][name] is None for name in NUMBERS)
        # Without keys, clients are known by their address, which this process shares with the one that trained.
        assert (rows[0]["sessions"], rows[0]["clients"], rows[0]["own"]["sessions"]) == (1, 1, 1)
        assert (rows[1]["sessions"], rows[1]["clients"], rows[1]["own"]["products"]) == (0, 0, 0)
        own, traffic = rows[0]["own"], session.traffic
        assert own["products"] == traffic.requests == 6
        assert traffic.bytes_up < own["bytes_in"] < traffic.bytes_up + 10_000
        assert traffic.bytes_down < own["bytes_out"] < traffic.bytes_down + 10_000
        assert own["evaluate_seconds"] >= traffic.evaluate_seconds > 0
    finally:
        session.close()


@pytest.mark.slow
@pytest.mark.xdist_group("monitor")
def test_a_worker_that_hangs_keeps_the_others_from_nothing(farm: list[remote.WorkerProcess]) -> None:
    with Watch(f"zmq://{farm[0].address},{farm[1].address}?insecure=1") as watch:
        assert [state.state for state in watch.look(20)] == ["up", "up"]
        farm[0].freeze()
        try:
            states = watch.look(0.5)
            assert [state.state for state in states] == ["silent", "up"]
            assert states[0].problem == "no answer"
            assert [state.state for state in watch.look(0.5)] == ["silent", "up"], "asked for its version again"
        finally:
            farm[0].thaw()
        end = time.monotonic() + 60
        while watch.look(2)[0].state != "up":
            assert time.monotonic() < end


@pytest.mark.slow
@pytest.mark.xdist_group("monitor")
def test_the_rate_is_that_between_looks(farm: list[remote.WorkerProcess]) -> None:
    model = model_at(farm[1])
    try:
        with Watch(f"mlwe+zmq://{farm[1].address}?insecure=1&request_bits=24") as watch:
            before = watch.look(20)[0]
            assert before.products_per_second is None
            for _ in range(4):
                model(torch.randn(5, 24))
            after = watch.look(20)[0]
    finally:
        ciphertune.session_of(model).close()
    assert before.status.own.products is not None
    assert after.status.own.products == before.status.own.products + 8
    assert after.products_per_second is not None
    assert after.products_per_second > 0


@pytest.mark.slow
@pytest.mark.xdist_group("monitor")
def test_a_terminal_shows_it_until_q(farm: list[remote.WorkerProcess]) -> None:
    nobody = f"127.0.0.1:{remote.free_port()}"
    parent, child = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "ciphertune",
        "top",
        f"zmq://{farm[0].address},{nobody}?insecure=1",
        "--interval",
        "0.2",
    ]
    process = subprocess.Popen(
        command,
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "20"},
    )
    os.close(child)
    try:
        text = ""
        end = time.monotonic() + 60
        # Drawn more than once.
        while text.count("1 of 2 workers answer") < 2 and time.monotonic() < end:
            readable, _, _ = select.select([parent], [], [], 1.0)
            text += os.read(parent, 1 << 16).decode() if readable else ""
        os.write(parent, b"q")
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            readable, _, _ = select.select([parent], [], [], 0.1)
            if readable:
                text += _read(parent)
        assert process.poll() == 0
        text += _read(parent)
    finally:
        process.kill()
        process.wait(60)
        os.close(parent)
    assert "\x1b[?1049h" in text
    assert "\x1b[?1049l" in text, "the screen was not given back"
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for part in ("WORKER", "BUSY", "SESS", "QUEUE", farm[0].address, "no answer", "nothing answers there", "q quit"):
        assert part in shown, part


def _read(descriptor: int) -> str:
    try:
        readable, _, _ = select.select([descriptor], [], [], 0)
        return os.read(descriptor, 1 << 16).decode() if readable else ""
    except OSError:  # the other end is closed
        return ""


@pytest.mark.slow
@pytest.mark.xdist_group("monitor")
def test_without_a_terminal_it_looks_once(farm: list[remote.WorkerProcess]) -> None:
    done = CliRunner().invoke(cli, ["top", f"zmq://{farm[0].address}?insecure=1"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "1 of 1 workers answer" in done.output
    assert farm[0].address in done.output


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mlwe", "names no workers elsewhere"),
        ("local://", "no transport that reaches workers elsewhere"),
        ("zmk://127.0.0.1:1", "did you mean 'zmq'"),
        ("mlwe://127.0.0.1:1", "no transport that reaches"),
        ("zmq://", "needs the workers' addresses"),
        ("zmq://127.0.0.1:1?curv=keys", "did you mean 'curve'"),
        ("zmq://127.0.0.1:1?request_bits=24", "unknown option 'request_bits'"),
        ("mlwe+zmq://127.0.0.1:1?request_bit=24", "did you mean 'request_bits'"),
        ("zmq://nonsense?insecure=1", "cannot read the address"),
    ],
)
def test_urls_that_name_no_workers(url: str, message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)):
        Watch(url)


def test_a_backend_that_does_not_encrypt_may_be_watched() -> None:
    transport, endpoints = transport_of("clear+zmq://127.0.0.1:5555?insecure=1&timeout=3")
    assert endpoints == ("127.0.0.1:5555",)
    assert transport.options.insecure is True


class Told(Link):
    """A worker that says what a test wants."""

    name = "told"

    def __init__(self, replies: Mapping[str, Any]) -> None:
        self.replies = replies

    def submit(self, request: Message) -> Future[Message]:
        future: Future[Message] = Future()
        reply = self.replies[request.kind]
        if isinstance(reply, Exception):
            future.set_exception(reply)
        elif reply is not None:
            future.set_result(reply)
        return future

    def close(self) -> None: ...


@pytest.fixture
def told(ciphertune_register: Callable[[str, Any], None]) -> Callable[[Any, Any], WorkerState]:
    """``told(hello, stats)``: what is shown of a worker with these replies."""

    def look(hello: Any, stats: Any) -> WorkerState:
        class ToldTransport(Transport):
            name = "told"
            Options = type(transport_of("zmq://127.0.0.1:1?insecure=1")[0]).Options

            def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[Link]:
                return [Told({"hello": hello, "stats": stats})]

        ciphertune_register("ciphertune.transports", ToldTransport)
        with Watch("told://x") as watch:
            return watch.look(0.05)[0]

    return look


GOOD = Message("ok", {"versions": spoken_versions(), "holdings": ""})


def test_what_makes_no_sense_is_not_shown(told: Callable[[Any, Any], WorkerState]) -> None:
    fields = {
        "sessions": "12", "clients": -1, "queued": True, "under_way": 1.5, "busy": 7, "layers": 2**70,
        "uptime_seconds": float("inf"), "weight_bytes": float("nan"), "bytes_in_per_second": None, "evaluators": [1],
        "version": "1.0\x1b[2J\n\u202e" + "x" * 500, "device": 3, "draining": "yes", "own": [1], "latency": 99,
        "products_per_second": 4, "worker": "elsewhere", "state": "fine", "problem": "none", "something": "new",
    }  # fmt: skip
    state = told(GOOD, Message("ok", fields))
    assert (state.worker, state.state, state.problem) == ("told", "up", "")
    for name in ("sessions", "clients", "queued", "under_way", "layers", "uptime_seconds", "weight_bytes", "device"):
        assert getattr(state.status, name) is None, name
    assert state.status.busy == 1.0
    assert state.latency is not None
    assert state.latency < 99
    assert state.products_per_second is None
    assert state.status.own == ClientUsage()
    assert state.status.version is not None
    assert state.status.version.isprintable()
    assert len(state.status.version) <= 40
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(screen([state], {}, 100, ""))
    assert "\x1b[2J" not in console.export_text()
    usage = told(GOOD, Message("ok", {"own": {"products": -1, "sessions": 2, "bytes_in": "x"}})).status.own
    assert usage == ClientUsage(sessions=2)


@pytest.mark.parametrize(
    ("hello", "stats", "problem"),
    [
        (TransportError("told: gone"), None, "gone"),
        (RuntimeError("quotes what was sent"), None, "RuntimeError"),
        (None, None, "no answer"),
        (GOOD, None, "no answer"),
        (Message("ok", {"versions": [90, 99]}), None, "speaks protocol versions 90 to 99"),
        (Message("ok", {}), None, "does not say which protocol versions"),
        (Message("evaluate"), None, "answered a 'hello' request with 'evaluate'"),
        (GOOD, Message("error", {"code": "busy", "message": "shutting\x07 down"}), "shutting� down"),
        (GOOD, Message("hello"), "answered a 'stats' request with 'hello'"),
    ],
)
def test_workers_that_do_not_tell(
    told: Callable[[Any, Any], WorkerState], hello: Any, stats: Any, problem: str
) -> None:
    state = told(hello, stats)
    assert state.state == "silent"
    assert problem in state.problem
    assert "quotes" not in state.problem


def states() -> list[WorkerState]:
    status = WorkerStatus(
        version="0.1.0", device="cuda:0", layers=210, weight_bytes=10**8, evaluators=1, draining=False,
        uptime_seconds=200_000, busy=0.95, sessions=12, clients=9, queued=31, under_way=33,
        bytes_in_per_second=12e6, bytes_out_per_second=480e6, own=ClientUsage(1, 1, 12345, 0, 10**9, 10**11, 99.0),
    )  # fmt: skip
    busy = WorkerState("worker-with-a-long-name.example.internal:5555", "up", "", 0.0123, status, 12.3)
    return [
        busy,
        WorkerState("b:1", "draining", status=WorkerStatus(busy=0.0)),
        WorkerState("c:1", "silent", "[bold]nothing[/bold] answers"),
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 110, 190])
def test_it_fits_any_window(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen(states(), {"b:1": deque([0.0, 0.5, 1.0])}, width, "every 2 s"))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for part in ("2 of 3 workers", "BUSY", "95%", "SESS", "12", "QUEUE", "31", "no answer", "q quit"):
        assert part in text, part
    assert "worker-" in text
    assert ("480" in text) == (width >= 80)
    assert ("2d07h" in text) == (width >= 110)
    assert ("12,345" in text) == (width >= 170)
    assert "[bold]nothing[/bold] answers" in " ".join(text.split()), "a worker's text is no markup"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_client_is_told_of_itself_exactly_and_of_others_no_more_than_load() -> None:
    """Of another client neither names, nor counts of products, nor sizes."""
    clock = Clock()
    worker = Worker(WeightStore.of({"a": WEIGHT}))
    service = Service(worker, clock=clock)

    def told(peer: str) -> dict[str, Any]:
        return service.status(peer).fields()

    try:
        first = told("watcher")
        for _ in range(7):
            _ask(
                service,
                "alice-key",
                Message("evaluate", {"session": "none"}, {"x": torch.zeros(5000, dtype=torch.uint8)}),
            )
        _wait(lambda: told("alice-key")["own"]["products"] == 7)
        # However often it is asked, all are told the same for a second.
        clock.now += 0.999
        assert {k: v for k, v in told("watcher").items() if k != "own"} == {
            k: v for k, v in first.items() if k != "own"
        }
        clock.now += 0.002
        seen = told("watcher")
        reply = _ask(service, "watcher", Message("stats"))
        assert reply.fields == seen
        assert seen["own"] == dict.fromkeys(seen["own"], 0)
        assert b"alice" not in b"".join(bytes(frame) for frame in pack(reply))
        assert (seen["clients"], seen["sessions"], seen["queued"]) == (1, 0, 0)
        # 35 kB in a moment are no megabyte a second on average.
        assert (seen["bytes_in_per_second"], seen["bytes_out_per_second"]) == (0, 0)
        mine = told("alice-key")["own"]
        assert (mine["products"], mine["errors"]) == (7, 7)
        assert 35_000 < mine["bytes_in"] < 37_000
        assert set(seen) == {
            *("version", "device", "layers", "weight_bytes", "evaluators", "draining", "uptime_seconds", "sessions"),
            *("clients", "queued", "under_way", "busy", "bytes_in_per_second", "bytes_out_per_second", "own"),
        }, "whatever is added must be thought of in docs/threat-model.md first"
        assert set(seen["own"]) == OWN
    finally:
        service.close()


def test_rates_are_coarse_and_of_the_last_seconds() -> None:
    disclosure = Disclosure(evaluators=1, started=1000.0)
    totals = Totals(1000.0)

    def after(seconds: int, bytes_in: float, busy: float) -> dict[str, Any]:
        nonlocal totals
        for _ in range(seconds):
            spent, received = totals.evaluate_seconds + busy, totals.bytes_in + int(bytes_in)
            totals = Totals(totals.time + 1, spent, received, received // 2)
            figures = disclosure.figures(totals, Load(0, 0, 0, 0, 0))
        return figures

    told = after(20, 123_456_789, 0.256)
    assert told["bytes_in_per_second"] == 120_000_000
    assert told["bytes_out_per_second"] == 62_000_000
    assert told["busy"] == pytest.approx(0.26)
    assert told["uptime_seconds"] == 20
    assert after(30, 0, 0.0)["busy"] == 0
    assert after(1, 4_900_000, 0.04)["bytes_in_per_second"] == 0, "a single request is not seen"


def test_a_long_product_counts_while_it_is_evaluated() -> None:
    begun, ended = threading.Event(), threading.Event()

    class Slow(Worker):
        def handle(self, request: Message, peer: str = "", pause: Callable[[], None] | None = None) -> Message:
            if request.kind == "evaluate":
                begun.set()
                assert ended.wait(60)
            return super().handle(request, peer, pause)

    clock = Clock()
    service = Service(Slow(WeightStore.of({"a": WEIGHT})), clock=clock)
    try:
        replies: list[Any] = []
        service.submit(pack(Message("evaluate")), "a", lambda frames, release: replies.append(frames))
        assert begun.wait(60)
        for _ in range(20):
            clock.now += 1
            status = service.status("b")
        assert (status.busy, status.under_way, status.queued, status.own.evaluate_seconds) == (1.0, 1, 0, 0)
        ended.set()
        _wait(lambda: bool(replies))
        assert service.status("a").own.evaluate_seconds == 20
    finally:
        ended.set()
        service.close()


def test_a_worker_that_drains_says_so() -> None:
    service = Service(Worker(WeightStore.of({"a": WEIGHT})))
    try:
        assert _ask(service, "a", Message("stats")).fields["draining"] is False
        assert service.drain(1)
        assert _ask(service, "a", Message("stats")).fields["draining"] is True
        assert _ask(service, "a", Message("hello")).fields["code"] == "busy"
    finally:
        service.close()


def _ask(service: Service, peer: str, message: Message) -> Message:
    replies: list[Message] = []
    service.submit(pack(message), peer, lambda frames, release: (replies.append(unpack(frames)), release())[0])
    _wait(lambda: bool(replies))
    return replies[0]


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_json_goes_on_until_it_is_interrupted(
    farm: list[remote.WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = iter([None, None])

    def sleep(seconds: float) -> None:
        assert seconds == 0.3
        if next(pauses, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr("ciphertune.cli.top.time", types.SimpleNamespace(sleep=sleep, time=time.time))
    done = CliRunner().invoke(cli, ["top", f"zmq://{farm[0].address}?insecure=1", "--json", "--interval", "0.3"])
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 3
    assert all(row["workers"][0]["worker"] == farm[0].address for row in rows)
