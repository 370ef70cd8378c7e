"""What strangers, other clients and workers do to each other: attacks that once worked, and must not again."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from ciphertune.client.connection import WorkerConnection
from ciphertune.errors import ReplyError, TransportError, WorkerError
from ciphertune.plugins import registry
from ciphertune.protocol import Frame, Limits, Message, error_message, pack, unpack
from ciphertune.transport import Connections, Link
from ciphertune.weights import LayerWeight, describe, quantize
from ciphertune.worker import Entrance, Quota, Service, SessionLimits, WeightStore, Worker

ESCAPES = "\x1b]0;owned\x07\x1b[2Jgone\r\nnext" + 5000 * "x"


def asked(service: Service, message: Message, peer: str = "client") -> Message:
    """The service's answer, which is taken at once."""
    answers: list[Message] = []
    arrived = threading.Event()

    def reply(frames: list[Frame], release: Callable[[], None]) -> None:
        answers.append(unpack(frames))
        release()
        arrived.set()

    service.submit(pack(message), peer, reply)
    assert arrived.wait(60)
    return answers[0]


class Canned(Link):
    """A worker that gives one answer to everything."""

    name = "canned"

    def __init__(self, answer: Message) -> None:
        self._answer = answer

    def submit(self, request: Message) -> Future[Message]:
        future: Future[Message] = Future()
        future.set_result(self._answer)
        return future

    def close(self) -> None:
        return


# Replies: their size is known before they are evaluated, and taken no longer than that.


def test_a_small_request_makes_no_large_reply() -> None:
    features, outputs, tokens = 8, 4096, 1000
    service = Service(Worker(WeightStore.of({"l": quantize(torch.randn(outputs, features), 8)})), Quota(64, 4 << 20))
    evaluated = []
    try:
        opened = asked(service, Message("open", {"backend": "mlwe", "groups": [["l"]], "public": {}}))
        session = service.worker.opened.find(opened.fields["session"], "client")
        honest = session.half.evaluate
        session.half.evaluate = lambda *asked: evaluated.append(1) or honest(*asked)  # type: ignore[method-assign,func-returns-value]
        fields = {"session": opened.fields["session"], "group": 0, "direction": "forward"}
        buffers = {"b": torch.zeros(features, 3, tokens, dtype=torch.uint8)}
        refused = asked(service, Message("evaluate", fields, buffers))
        assert (refused.kind, refused.fields["code"]) == ("error", "quota")
        assert str(outputs * 3 * tokens) in refused.fields["message"]
        assert not evaluated, "its size is known before anything is evaluated"
        assert service.load.nbytes == 0
        small = {"b": torch.zeros(features, 3, 10, dtype=torch.uint8)}
        assert asked(service, Message("evaluate", fields, small)).kind == "ok"
    finally:
        service.close()


def test_quota_for_a_reply_is_reserved_before_it_is_evaluated() -> None:
    features, outputs, tokens = 8, 4096, 100
    reply_bytes = 3 * outputs * tokens
    service = Service(
        Worker(WeightStore.of({"l": quantize(torch.randn(outputs, features), 8)})), Quota(64, 2 * reply_bytes)
    )
    gate = threading.Event()
    try:
        opened = asked(service, Message("open", {"backend": "mlwe", "groups": [["l"]], "public": {}}))
        half = service.worker.opened.find(opened.fields["session"], "client").half
        honest = half.evaluate
        half.evaluate = lambda *given: honest(*given) if gate.wait(60) else {}  # type: ignore[method-assign]
        fields = {"session": opened.fields["session"], "group": 0, "direction": "forward"}
        request = Message("evaluate", fields, {"b": torch.zeros(features, 3, tokens, dtype=torch.uint8)})
        first: list[Message] = []
        service.submit(pack(request), "client", lambda frames, release: (first.append(unpack(frames)), release()))  # type: ignore[arg-type,func-returns-value]
        assert service.load.nbytes > reply_bytes
        assert asked(service, request).fields["code"] == "busy"
        gate.set()
        assert service.drain(60)
        assert first[0].kind == "ok"
    finally:
        gate.set()
        service.close()


@pytest.mark.parametrize("name", ["mlwe", "clear", "clear?weight_bits=16", "simulation", "mlwe?weight_bits=16"])
def test_both_ends_know_the_size_of_a_reply(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ciphertune
    from ciphertune.client.session import Session

    found: list[tuple[int | None, int, int]] = []
    handle = Worker.handle

    def watched(self: Worker, request: Message, peer: str = "", *rest: Any) -> Message:
        foretold = self.foresee(request, peer).reply_bytes
        reply = handle(self, request, peer, *rest)
        if request.kind == "evaluate":
            found.append((request.reply_bytes, foretold, reply.nbytes))
        return reply

    monkeypatch.setattr(Worker, "handle", watched)
    model = ciphertune.outsource(torch.nn.Sequential(torch.nn.Linear(12, 7)), name, "all")
    x = torch.randn(5, 12, requires_grad=True)
    model(x).sum().backward()
    session: Session = ciphertune.session_of(model)
    session.close()
    assert len(found) == 2
    assert all(client == worker == actual > 0 for client, worker, actual in found), found


def served(name: str, handler: Any, folder: Path) -> tuple[Any, Link]:
    """A listener, and a link to it, over one of the transports that serve on this machine."""
    transport = registry.load(registry.TRANSPORTS, name)
    loopback = transport.loopback(folder, {})
    listener = transport.listen(handler, loopback.address, loopback.serve)
    (link,) = transport(transport.Options(**loopback.connect)).connect((listener.address,), None)
    return listener, link


class Bloated:
    """A worker that answers with more than it was asked for."""

    limits = Limits()

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None]:
        return lambda: None

    def submit(self, frames: Any, peer: str, reply: Any, connection: Any = None, *, idle: bool = False) -> None:
        request = unpack(frames)
        size = int(request.fields["size"])
        reply(pack(Message("ok", {}, {"y": torch.zeros(size, dtype=torch.uint8)})), lambda: None)

    def left(self, peer: str, connection: Any) -> None:
        return

    def dismiss(self, peer: str) -> None:
        return

    def refused(self, peer: str, why: str) -> None:
        return


def test_a_client_takes_no_longer_reply_than_it_asked_for(tmp_path: Path) -> None:
    listener, link = served("zmq", Bloated(), tmp_path)
    try:
        for size, good in ((1000, True), (1001, False), (8 << 20, False), (1000, True)):
            future = link.submit(Message("evaluate", {"size": size}, reply_bytes=1000))
            if good:
                assert future.result(60).buffers["y"].nbytes == size
            else:
                # One that is far too long is cut as it comes.
                with pytest.raises((ReplyError, TransportError)):
                    future.result(60)
    finally:
        link.close()
        listener.close()


def test_a_longer_answer_of_a_relay_is_passed_over() -> None:
    from ciphertune_ray.channel import Channel, socket_pair

    here, there = socket_pair()
    sender, receiver = Channel(there), Channel(here, lambda head: 100 if head["id"] == 1 else None)
    try:
        sender.send({"id": 1}, [bytes(101)])
        sender.send({"id": 2}, [bytes(101)])
        sender.send({"id": 1}, [bytes(100)])
        head, frames = receiver.receive() or ({}, [])
        assert head["kind"] == "ReplyError"
        assert frames == []
        assert [len(frame) for frame in (receiver.receive() or ({}, []))[1]] == [101]
        assert [len(frame) for frame in (receiver.receive() or ({}, []))[1]] == [100]
    finally:
        sender.close()
        receiver.close()


# Weights: what is prepared is shared, whatever a client sends, and counted.


def test_prepared_weights_are_kept_once_whatever_clients_send() -> None:
    rows = 64
    store = WeightStore()
    weights = [LayerWeight(torch.randint(-32000, 32000, (rows, 32), dtype=torch.int16), torch.ones(rows))] * 2
    shards = [describe(name, weight).shard() for name, weight in zip("ab", weights, strict=True)]
    store.add(shards, torch.cat([weight.codes for weight in weights]))
    worker = Worker(store, limits=SessionLimits(sessions=64))
    for groups in ([["a"], ["b"]], [["a", "b"]], [["a"], ["a"], ["a", "b"]]):
        for _ in range(4):
            opening = Message("open", {"backend": "mlwe", "groups": groups, "public": {}})
            assert worker.handle(opening, "client").kind == "ok"
    assert worker.prepared_bytes == store.nbytes, "two digits of a byte for each code, once"
    junk = Message("open", {"backend": "mlwe", "groups": [["a"]], "public": {"junk": 1}})
    assert worker.handle(junk, "client").kind == "error"
    for number in range(4):
        plain = Message("open", {"backend": "clear", "groups": [["a"]], "public": {"junk": number}})
        assert worker.handle(plain, "client").kind == "ok"
    (held,) = worker.held
    assert len(held.prepared) == 2, "one for each backend"


def test_what_is_prepared_for_a_session_alone_counts_against_its_client() -> None:
    store = WeightStore.of({"l": quantize(torch.randn(64, 32), 8)})
    worker = Worker(store, limits=SessionLimits(nbytes=100))
    opening = Message("open", {"backend": "simulation", "groups": [["l"]], "public": {"seed": 1}})
    assert worker.handle(opening, "client").fields["code"] == "quota"


# Text of a worker.


@pytest.mark.parametrize("code", ["protocol", "\x1b[2J", "busy"])
def test_a_workers_text_is_cleaned(code: str) -> None:
    connection = WorkerConnection(Canned(error_message(code, ESCAPES)))
    with pytest.raises(Exception, match="gone") as caught:
        connection.reply(connection.hello(), 1, "hello")
    shown = str(caught.value)
    assert shown.isprintable()
    assert len(shown) < 2200
    assert str(getattr(caught.value, "code", "")).isprintable()


# Backends.


def test_a_client_gets_only_backends_that_are_offered() -> None:
    worker = Worker(WeightStore.of({"l": quantize(torch.randn(4, 4), 8)}), backends=["mlwe"])
    assert worker.handle(Message("hello", {"versions": [1, 1]})).fields["backends"] == ["mlwe"]
    refused = worker.handle(Message("open", {"backend": "clear", "groups": [["l"]], "public": {}}))
    assert refused.fields["code"] == "plugin"
    assert "does not offer the backend 'clear'; it offers mlwe" in refused.fields["message"]
    connection = WorkerConnection(Canned(refused))
    with pytest.raises(WorkerError, match="--backends"):
        connection.reply(connection.hello(), 1, "open")
    assert worker.handle(Message("open", {"backend": "mlwe", "groups": [["l"]], "public": {}})).kind == "ok"


# Connections.


def test_strangers_are_bounded_in_all_and_by_address() -> None:
    now = 0.0
    connections: Connections[int] = Connections(100, 10, lambda: now)
    for number in range(30):
        connections.came(number, "client")
        connections.known(number)
    closed: list[int] = []
    for number in range(100, 400):
        connections.came(number, "stranger")
        closed += connections.excess()
    assert len(connections) == 100
    now = 3.0
    closed += connections.excess()
    assert closed == list(range(100, 400 - connections.strangers_per_address)), "the oldest, and no client"
    for number in range(1000, 1040):
        connections.came(number, f"address {number}")
        closed += connections.excess()
    now = 6.0
    closed += connections.excess()
    assert len(connections) == 30 + connections.strangers
    connections.came(5000, "late client")
    assert 5000 not in connections.excess()
    connections.known(5000)
    connections.stranger_again(5000)
    now = 17.0
    assert 5000 in connections.excess()
    assert len(connections) == 30
    for number in range(6000, 6100):
        connections.came(number, "client")
        connections.known(number)
        connections.excess()
    assert len(connections) == 100


STRANGERS = """
import os, resource, socket, sys, threading, time
from pathlib import Path
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
import torch, zmq
from ciphertune.plugins import registry
from ciphertune.worker import Service, WeightStore, Worker
from ciphertune.weights import quantize
from ciphertune_zmq.security import AuthorisedClients
folder = Path(sys.argv[1])
transport = registry.load(registry.TRANSPORTS, "zmq")
loopback = transport.loopback(folder, {})
service = Service(Worker(WeightStore.of({"l": quantize(torch.randn(8, 8), 8)})))
resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))
listener = transport.listen(service, loopback.address, loopback.serve)
print(listener.address, flush=True)
for line in sys.stdin:
    if line.strip() == "exhaust":
        held = []
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        # A key that cannot be looked up is refused; the thread that asks lives on.
        print(AuthorisedClients(folder / "keys" / "clients").callback("", b"x"), flush=True)
    if line.strip() == "recover":
        for each in held:
            os.close(each)
        print(listener._loop._authenticator.is_alive(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted on Linux")
def test_strangers_and_used_up_descriptors_keep_no_client_out(tmp_path: Path) -> None:
    """300 silent connections at a worker that may open 160 files; then no descriptor left at all, for a moment."""
    transport = registry.load(registry.TRANSPORTS, "zmq")
    loopback = transport.loopback(tmp_path, {})
    command = [sys.executable, "-c", STRANGERS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdin is not None
        try:
            address = worker.stdout.readline().strip()

            def hello() -> str:
                (link,) = transport(transport.Options(**loopback.connect)).connect((address,), None)
                connection = WorkerConnection(link)
                try:
                    for attempt in range(40):
                        try:
                            return connection.reply(connection.hello(), 10, "hello").kind
                        except TransportError:
                            if attempt == 39:
                                raise
                            threading.Event().wait(0.25)
                    return "no answer"
                finally:
                    link.close()

            assert hello() == "ok"
            host, port = address.rsplit(":", 1)
            silent = [socket.create_connection((host, int(port)), 10) for _ in range(300)]
            assert hello() == "ok", "with 300 silent connections"
            for each in silent:
                each.close()
            for order, answer in (("exhaust", "False"), ("recover", "True")):
                worker.stdin.write(order + "\n")
                worker.stdin.flush()
                assert worker.stdout.readline().strip() == answer
            assert hello() == "ok", "after descriptors were used up"
        finally:
            worker.kill()


def test_quota_is_reserved_for_what_is_still_to_come() -> None:
    service = Service(Worker(WeightStore.of({"l": quantize(torch.randn(4, 4), 8)})), Quota(4, 1000))
    entrance = Entrance(Limits())
    assert entrance.reserve("client", 1) is None, "weights are still read"
    entrance.open(service)
    try:
        first = entrance.reserve("client", 900)
        assert first is not None
        assert service.load.nbytes == 900
        assert entrance.reserve("client", 200) is None
        assert entrance.reserve("other", 200) is not None, "quotas are a client's own"
        first()
        first()
        assert entrance.reserve("client", 200) is not None
    finally:
        service.close()


def test_zmq_takes_no_frame_larger_than_a_chunk(tmp_path: Path) -> None:
    """ZeroMQ allocates what a frame announces, before it knows who sends it."""
    import zmq

    listener, link = served("zmq", Bloated(), tmp_path)
    try:
        assert listener._loop.socket.getsockopt(zmq.MAXMSGSIZE) < 4 << 20
        assert link.socket.getsockopt(zmq.MAXMSGSIZE) < 4 << 20  # type: ignore[attr-defined]
    finally:
        link.close()
        listener.close()
