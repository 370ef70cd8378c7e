"""The ZeroMQ transport on this machine's loopback address."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.server
import itertools
import os
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import remote
import torch
import warm
import zmq
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune._support.turns import turn_seconds
from ciphertune.client.choice import choose
from ciphertune.errors import (
    KeyFileError,
    PluginError,
    ProtocolError,
    RefusedError,
    ReplyError,
    SecurityError,
    SelectionError,
    TransportError,
    WorkerError,
)
from ciphertune.plugins import registry
from ciphertune.protocol import Frame, Limits, Message, pack, unpack
from ciphertune.testing import EchoHandler
from ciphertune.transport import Link, RequestHandler
from ciphertune.weights import quantize
from ciphertune.worker import Quota, Service, SessionLimits, WeightStore, Worker
from ciphertune_zmq.framing import ALIGNMENT, CHUNK, PLAIN_CHUNK, SMALL, unwrap, wrap

ZmqTransport = registry.load(registry.TRANSPORTS, "zmq")
FAST = "connect_timeout=1.5"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))


def store(bits: Any = 8) -> WeightStore:
    return WeightStore.of({name: quantize(network()[int(name)].weight, bits) for name in "02"})  # type: ignore[arg-type]


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service(Worker(store()), limits=Limits(buffer_bytes=100 << 20, total_bytes=100 << 20))
    yield running
    running.close()


@contextlib.contextmanager
def listening(service: RequestHandler, address: str = "127.0.0.1:*", **options: Any) -> Iterator[Any]:
    listener = ZmqTransport.listen(service, address, options)
    try:
        yield listener
    finally:
        listener.close()


@pytest.fixture
def plain(service: Service) -> Iterator[str]:
    with listening(service, insecure=True) as listener:
        yield listener.address


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    ZmqTransport.make_keys(tmp_path / "keys", ("client",), worker=True)
    return tmp_path / "keys"


@pytest.fixture
def curved(service: Service, keys: Path) -> Iterator[str]:
    with listening(service, curve=str(keys)) as listener:
        yield listener.address


def link_to(text: str) -> Link:
    choice = choose(text)
    (link,) = choice.transport.connect(choice.selection.endpoints, None)
    return link


def products(to: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = ciphertune.outsource(network(), to)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    try:
        y = model(x)
        y.square().sum().backward()
    finally:
        session_of(model).close()
    assert x.grad is not None
    return y.detach(), x.grad


def test_products_over_curve_and_plain_tcp_and_unix_sockets(
    plain: str, curved: str, keys: Path, service: Service, tmp_path: Path
) -> None:
    expected = products("clear?weight_bits=8")
    with listening(service, f"ipc://{tmp_path / 'w.sock'}") as unix:
        for way in (f"{plain}?insecure=1", f"{curved}?curve={keys}", f"{unix.address}?timeout=9"):
            found = products(f"clear+zmq://{way}&weight_bits=8&allow_insecure=1")
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            found = products(f"mlwe+zmq://{way}")
            assert all(float((a - b).norm() / b.norm()) < 0.02 for a, b in zip(found, expected, strict=True))
    assert service.load.sessions == 0
    assert service.load.under_way == 0


@pytest.mark.parametrize("secure", [True, False])
def test_large_and_empty_buffers(keys: Path, secure: bool) -> None:
    handler = EchoHandler()
    options = {"curve": str(keys)} if secure else {"insecure": True}
    with listening(handler, **options) as listener:
        link = link_to(f"mlwe+zmq://{listener.address}?" + (f"curve={keys}" if secure else "insecure=1"))
        large = torch.randint(256, (60 << 20,), dtype=torch.uint8)
        sent = {"large": large, "odd": large[: (1 << 19) + 1], "empty": torch.zeros(0, 3), "small": torch.ones(2)}
        reply = link.submit(Message("ok", {"n": 1}, sent)).result(60)
        assert all(torch.equal(reply.buffers[name], sent[name]) for name in sent)
        assert link.submit(Message("hello")).result(60).kind == "hello"
        end = time.monotonic() + 60
        while handler.released < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert handler.released == 2, "the reply's memory is given back once it has left"
        link.close()


@contextlib.contextmanager
def holding() -> Iterator[tuple[EchoHandler, Any, Link]]:
    """A handler that keeps its answers, its listener, and a link to it, which whoever takes it closes."""
    handler = EchoHandler()
    handler.hold = True
    with listening(handler, insecure=True) as listener:
        yield handler, listener, link_to(f"mlwe+zmq://{listener.address}?insecure=1")


def test_many_requests_are_answered_in_any_order() -> None:
    with holding() as (handler, _, link):
        futures = [link.submit(Message("ok", {"n": n})) for n in range(100)]
        end = time.monotonic() + 60
        while len(handler.kept) < 100 and time.monotonic() < end:
            time.sleep(0.01)
        futures[3].cancel()
        handler.answer(backwards=True)
        assert [f.result(60).fields["n"] for i, f in enumerate(futures) if i != 3] == [n for n in range(100) if n != 3]
        link.close()


def test_threads_share_a_link(plain: str) -> None:
    link = link_to(f"mlwe+zmq://{plain}?insecure=1")
    kinds: list[str] = []

    def run() -> None:
        kinds.extend(link.submit(Message("hello")).result(60).kind for _ in range(50))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    link.close()
    assert kinds == ["ok"] * 400


def test_who_waits_for_a_reply_receives_it(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    link = link_to(f"mlwe+zmq://{plain}?insecure=1")
    receiving: list[threading.Thread] = []
    receive = type(link)._receive  # type: ignore[attr-defined]

    def recorded(self: Any) -> None:
        before = len(self._incoming)
        receive(self)
        receiving.extend([threading.current_thread()] * (len(self._incoming) - before))

    monkeypatch.setattr(type(link), "_receive", recorded)
    for _ in range(30):
        assert link.submit(Message("hello")).result(60).kind == "ok"
    # The socket's thread may be first now and then.
    assert receiving.count(threading.current_thread()) > 15
    # Whoever does not wait by the future gets replies all the same.
    done = threading.Event()
    futures = [link.submit(Message("hello")) for _ in range(3)]
    futures[0].add_done_callback(lambda _: done.set())
    assert done.wait(60)
    assert not concurrent.futures.wait(futures, 60).not_done
    link.close()


def test_one_waits_while_another_asks() -> None:
    """A thread that receives for itself gives way to the socket's own once others wait, and neither is forgotten."""
    with holding() as (handler, _, link):
        kinds: list[str] = []
        first = threading.Thread(target=lambda: kinds.append(link.submit(Message("hello")).result(60).kind))
        first.start()
        eventually(lambda: len(handler.kept) == 1)
        second = threading.Thread(target=lambda: kinds.append(link.submit(Message("hello")).result(60).kind))
        second.start()
        eventually(lambda: len(handler.kept) == 2)
        with pytest.raises(concurrent.futures.TimeoutError):
            link.submit(Message("hello")).result(0.05)
        handler.answer(backwards=True)
        first.join(60)
        second.join(60)
        assert kinds == ["hello", "hello"]
        link.close()


def test_a_thread_that_waits_learns_at_once_that_the_worker_is_gone() -> None:
    with holding() as (handler, listener, link):
        future = link.submit(Message("hello"))
        eventually(lambda: len(handler.kept) == 1)
        closing = threading.Timer(0.2, listener.close)
        closing.start()
        with pytest.raises(TransportError, match="lost"):
            future.result(60)
        closing.join()
        link.close()


@pytest.mark.slow
def test_only_authorised_clients_are_served(curved: str, keys: Path, tmp_path: Path) -> None:
    strangers = tmp_path / "strangers"
    ZmqTransport.make_keys(strangers, ("client",), worker=True)
    with pytest.raises(TransportError, match="key"):
        products(f"mlwe+zmq://{curved}?curve={strangers}&{FAST}")
    # The right worker's key, but a client that is not in clients/.
    (strangers / "worker.pub").unlink()
    (strangers / "worker.pub").write_bytes((keys / "worker.pub").read_bytes())
    # At once, and not after the time that a worker has to answer.
    with pytest.raises(RefusedError, match=rf"^{curved}: it refused this client: the client's key is not authorised"):
        products(f"mlwe+zmq://{curved}?curve={strangers}&connect_timeout=3600")
    with pytest.raises(TransportError):
        products(f"mlwe+zmq://{curved}?insecure=1&{FAST}")
    products(f"mlwe+zmq://{curved}?curve={keys}")
    # It counts for the next connection, without a restart; and the other way round.
    authorised = keys / "clients" / "stranger.pub"
    authorised.write_bytes((strangers / "clients" / "client.pub").read_bytes())
    products(f"mlwe+zmq://{curved}?curve={strangers}")
    authorised.unlink()
    with pytest.raises(RefusedError):
        products(f"mlwe+zmq://{curved}?curve={strangers}&connect_timeout=3600")


def test_a_session_belongs_to_a_key(curved: str, keys: Path) -> None:
    ZmqTransport.make_keys(keys, ("alice", "bob"), worker=False)
    alice, bob = (link_to(f"mlwe+zmq://{curved}?curve={keys}&client={name}") for name in ("alice", "bob"))
    opening = Message("open", {"backend": "clear", "groups": [["0"]], "public": {}})
    name = alice.submit(opening).result(60).fields["session"]
    request = Message("evaluate", {"session": name, "group": 0, "direction": "forward"}, {"x": torch.zeros(1, 24)})
    assert bob.submit(request).result(60).fields["code"] == "unknown-session"
    assert alice.submit(request).result(60).kind == "ok"
    for link in (alice, bob):
        link.close()


def test_plain_tcp_has_to_be_asked_for(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIPHERTUNE_KEYS", str(tmp_path / "none"))
    with pytest.raises(KeyFileError, match=r"client.key is missing: make keys with 'ciphertune keys'"):
        products("mlwe+zmq://127.0.0.1:1")
    with pytest.raises(KeyFileError, match=r"worker.key is missing"):
        ZmqTransport.listen(service, "127.0.0.1:*", {})
    with pytest.raises(SecurityError, match="insecure is for this machine only, and 192.0.2.1:5555 is not"):
        products("mlwe+zmq://192.0.2.1:5555?insecure=1")
    with pytest.raises(SecurityError, match="no_authentication"):
        ZmqTransport.listen(service, "0.0.0.0:*", {"insecure": True})
    with pytest.raises(SecurityError, match="allow_insecure=1"):
        products("clear+zmq://127.0.0.1:1?insecure=1")
    with listening(service, "0.0.0.0:*", no_authentication=True) as listener:
        port = listener.address.rpartition(":")[2]
        products(f"mlwe+zmq://127.0.0.1:{port}?insecure=1")


def test_key_files(keys: Path) -> None:
    for name in ("worker.key", "client.key"):
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    with pytest.raises(KeyFileError, match="never overwritten"):
        ZmqTransport.make_keys(keys, ("client",), worker=False)
    to = f"mlwe+zmq://127.0.0.1:1?curve={keys}"
    secret = (keys / "client.key").read_text()
    (keys / "client.key").chmod(0o640)
    with pytest.raises(KeyFileError, match=r"can be read by others \(mode 0640\)"):
        products(to)
    (keys / "client.key").chmod(0o600)
    half = (keys / "worker.key").read_text().split('"secret": "')[1]
    mixed = secret.split('"secret": "')[0] + '"secret": "' + half
    for text, why in (("", "damaged"), (secret[:-9], "damaged"), (mixed, "do not belong together"), ("{}", "damaged")):
        (keys / "client.key").write_text(text)
        with pytest.raises(KeyFileError, match=why) as failure:
            products(to)
        assert half[:40] not in str(failure.value)
    (keys / "worker.pub").unlink()
    (keys / "client.key").write_text(secret)
    with pytest.raises(KeyFileError, match=r"worker.pub is missing"):
        products(to)


def test_secrets_show_nowhere(keys: Path, curved: str) -> None:
    from ciphertune_zmq.keys import read_pair

    pair = read_pair(keys / "client.key")
    assert pair.secret.decode() not in repr(pair)
    choice = choose(f"mlwe+zmq://{curved}?curve={keys}")
    (link,) = choice.transport.connect(choice.selection.endpoints, None)
    assert pair.secret.decode() not in repr(vars(link)) + repr(choice)
    link.close()


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":5555", "host:70000", "udp://host:5", "ipc://", "host:x", "a b", "file://x", "https://host"],
)
def test_addresses_that_are_none(text: str) -> None:
    from ciphertune_zmq.address import parse

    with pytest.raises(SelectionError, match="expected HOST:PORT"):
        parse(text)


def test_errors_of_endpoints_and_options(service: Service, plain: str) -> None:
    with pytest.raises(SelectionError, match="needs the workers' addresses"):
        products("mlwe+zmq://?insecure=1")
    with pytest.raises(SelectionError, match="heartbeat"):
        products(f"mlwe+zmq://{plain}?insecure=1&heartbeat=0")
    with pytest.raises(TransportError, match="cannot listen at"):
        ZmqTransport.listen(service, plain, {"insecure": True})
    with pytest.raises(SelectionError, match="unknown option 'colour'"):
        ZmqTransport.listen(service, plain, {"colour": "red"})


def test_closing_fails_pending_requests() -> None:
    with holding() as (_, _, link):
        future = link.submit(Message("hello"))
        link.close()
        link.close()
        with pytest.raises(TransportError, match="closed"):
            future.result(60)
        with pytest.raises(TransportError, match="closed"):
            link.submit(Message("hello")).result(60)


def test_a_link_connects_again_by_itself(service: Service) -> None:
    with listening(service, insecure=True) as first:
        address = first.address
        link = link_to(f"mlwe+zmq://{address}?insecure=1")
        assert link.submit(Message("hello")).result(60).kind == "ok"
    end = time.monotonic() + 60
    with pytest.raises(TransportError):
        link.submit(Message("hello")).result(60)
    with listening(service, address, insecure=True):
        while time.monotonic() < end:
            with contextlib.suppress(TransportError):
                assert link.submit(Message("hello")).result(60).kind == "ok"
                break
            time.sleep(0.05)
        else:
            pytest.fail("the link did not come back")
    link.close()


def losses(to: str, before: dict[int, Any]) -> list[float]:
    """Of six steps of a layer behind outsourced ones; what is to be done before a step is called then."""
    model = ciphertune.outsource(network(), to)
    torch.manual_seed(3)
    head, x = nn.Linear(8, 4), torch.randn(5, 24)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    found = []
    try:
        for step in range(6):
            before.get(step, lambda: None)()
            optimizer.zero_grad()
            loss = head(model(x)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    finally:
        session_of(model).close()
    return found


def put(file: Path, text: str) -> None:
    """Write a file that appears whole."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)


def test_a_client_follows_a_worker_to_another_address_while_it_trains(keys: Path, tmp_path: Path) -> None:
    """Known by its key: neither one who listens at the old address nor one whom the file names instead is used."""
    file = tmp_path / "worker.address"
    ZmqTransport.make_keys(tmp_path / "strange", ("client",), worker=True)
    (tmp_path / "strange/clients/client.pub").write_bytes((keys / "clients/client.pub").read_bytes())
    stranger = EchoHandler()
    services = [Service(Worker(store())) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for service in services:
            stack.callback(service.close)
        listeners = [ZmqTransport.listen(services[0], "127.0.0.1:*", {"curve": str(keys)})]
        first = listeners[0].address
        put(file, first + "\n")

        def moves() -> None:
            listeners[0].close()
            listeners.append(ZmqTransport.listen(stranger, first, {"curve": str(tmp_path / "strange")}))

            def comes_back() -> None:
                for text in (None, "no address", f"ipc://{tmp_path}/x", "x" * 400, listeners[1].address):
                    put(file, text) if text else file.unlink()
                    time.sleep(0.2)
                listeners.append(ZmqTransport.listen(services[1], "127.0.0.1:*", {"curve": str(keys)}))
                put(file, listeners[2].address)

            later = threading.Thread(target=comes_back)
            later.start()
            stack.callback(later.join)

        to = f"clear+zmq://file://{file}?curve={keys}&allow_insecure=1&weight_bits=8&heartbeat=0.3"
        found = losses(to, {2: moves})
        for listener in listeners:
            stack.callback(listener.close)
    assert found == losses("clear?weight_bits=8", {})
    assert listeners[2].address != first
    # It was tried there, and no message was sent.
    assert stranger.refusals
    assert not stranger.peers


def test_places_of_addresses(service: Service, keys: Path, tmp_path: Path) -> None:
    file = tmp_path / "second.address"
    with listening(service, curve=str(keys)) as listener:
        link = link_to(f"mlwe+zmq://file://{file}?curve={keys}")
        with pytest.raises(TransportError, match=r"its address cannot be read from file://.*No such file"):
            link.submit(Message("hello")).result(60)
        put(file, "10.0.0.5:*")
        eventually(lambda: "is no address" in problem(link))
        put(file, listener.address)
        eventually(lambda: not problem(link))
        link.close()
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            place = f"http://127.0.0.1:{server.server_port}"
            link = link_to(f"mlwe+zmq://{place}/second.address?curve={keys}")
            eventually(lambda: not problem(link))
            link.close()
            link = link_to(f"mlwe+zmq://{place}/third.address?curve={keys}")
            with pytest.raises(TransportError, match="404"):
                link.submit(Message("hello")).result(60)
            link.close()
            server.shutdown()
    # Its own key, by the file's name: the worker with the other key is not taken for it.
    (keys / "second.pub").write_bytes((keys / "clients/client.pub").read_bytes())
    with pytest.raises(KeyFileError, match="of one pair"):
        link_to(f"mlwe+zmq://file://{file}?curve={keys}")
    with pytest.raises(SecurityError, match="insecure is for this machine only"):
        link_to(f"mlwe+zmq://file://{file}?insecure=1")
    with pytest.raises(SelectionError, match="a worker listens at HOST:PORT"):
        ZmqTransport.listen(service, f"file://{file}", {"curve": str(keys)})


def problem(link: Link) -> str:
    """What a request fails with; empty for none."""
    try:
        link.submit(Message("hello")).result(60)
    except TransportError as error:
        return str(error)
    return ""


def descriptors() -> int:
    """Open files of this process, where that can be told."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def raw_peer(address: str) -> socket.socket:
    """A ZMTP 3.0 connection without security, past its handshake: a peer that sends what it likes."""
    host, _, port = address.rpartition(":")
    peer = socket.create_connection((host, int(port)), timeout=60)
    peer.sendall(b"\xff" + b"\0" * 8 + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32)
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    peer.sendall(bytes([4, len(body)]) + body)
    left = 64
    while left:  # With a timeout MSG_WAITALL does not wait for all.
        received = len(peer.recv(left))
        assert received, "the worker ended the connection"
        left -= received
    return peer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a connection received")
def test_a_message_without_an_end_is_cut(service: Service) -> None:
    with listening(service, insecure=True, max_incomplete_bytes=20 << 20) as listener:
        good = link_to(f"mlwe+zmq://{listener.address}?insecure=1")
        bad = raw_peer(listener.address)
        frame = b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20)
        sent = 0
        # Cut while ZeroMQ takes nothing from it, a connection is not reset: nobody reads from it any more.
        with contextlib.suppress(ConnectionError, TimeoutError):
            while sent < 4 << 30:
                bad.sendall(frame)
                sent += len(frame)
                if sent % (16 << 20) < len(frame):
                    assert good.submit(Message("hello")).result(60).kind == "ok"
        assert 20 << 20 <= sent < 4 << 30
        bad.close()
        assert good.submit(Message("hello")).result(60).kind == "ok"
        good.close()


def test_links_share_a_context_and_leave_nothing_behind(plain: str) -> None:
    transport = choose(f"mlwe+zmq://{plain}?insecure=1").transport
    links = list(transport.connect((plain,), None))
    before = descriptors()
    for _ in range(20):
        links += transport.connect((plain,), None)
    for link in links:
        assert link.submit(Message("hello", {"versions": [1]})).result(60).kind == "ok"
    # Both ends of each connection are in this process.
    assert descriptors() <= before + 20 * 8
    for link in links[1:]:
        link.close()
    end = time.monotonic() + 60
    while descriptors() > before + 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert descriptors() <= before + 4
    links[0].close()


def test_too_few_descriptors_are_an_error_and_not_the_end_of_the_process(plain: str) -> None:
    code = f"""
        import os, resource, zmq
        from ciphertune.client.choice import choose
        from ciphertune.errors import TransportError
        from ciphertune.protocol import Message
        transport = choose("mlwe+zmq://{plain}?insecure=1").transport
        held, most = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        links = []
        for spare in range(2, 80, 3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (held + spare, most))
            try:
                links += transport.connect(("{plain}",), None)
            except TransportError as error:
                assert "file descriptors" in str(error)
                print("refused")
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1024), most))
        links += transport.connect(("{plain}",), None)
        for link in links:
            assert link.submit(Message("hello", {{"versions": [1]}})).result(60).kind == "ok"
        print(len(links), "opened")
    """
    done = warm.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout
    assert int(done.stdout.split()[-2]) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_opens_links_of_its_own(plain: str) -> None:
    code = f"""
        import os, signal
        from ciphertune.client.choice import choose
        from ciphertune.protocol import Message
        transport = choose("mlwe+zmq://{plain}?insecure=1").transport
        def ask():
            (link,) = transport.connect(("{plain}",), None)
            assert link.submit(Message("hello", {{"versions": [1]}})).result(60).kind == "ok"
            return link
        link = ask()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            ask().close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        link.close()
        ask().close()
    """
    done = warm.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_strangers_leave_nothing_behind(service: Service) -> None:
    with listening(service, insecure=True) as listener:
        host, _, port = listener.address.rpartition(":")
        products(f"mlwe+zmq://{listener.address}?insecure=1")  # opens what stays open
        before = descriptors()
        for junk in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(500), b"\xff" + b"\0" * 80, b"\x00" * 64) * 20:
            stranger = socket.create_connection((host, int(port)))
            stranger.sendall(junk)
            stranger.close()
        products(f"mlwe+zmq://{listener.address}?insecure=1")
        end = time.monotonic() + 60
        while descriptors() > before + 3 and time.monotonic() < end:
            time.sleep(0.1)
        assert descriptors() <= before + 3


def envelope(*numbers: int) -> bytes:
    """What comes before a message's frames."""
    return b"12345678" + struct.pack(f"<{1 + len(numbers)}I", len(numbers), *numbers)


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"x"],
        [b"12345678"],
        [b"12345678", b"junk"],
        [envelope(1), b"junk"],
        [envelope(2), b"junk"],
        [envelope(0), b"junk"],
        [envelope(0xFFFFFFFF), b"junk"],
        [envelope(1)[:-1], b"junk"],
        [envelope(1, 1)[:-4], b"junk"],
        [envelope(1) + b"more", b"junk"],
        [b"12345678", *[b"y"] * 5000],
        [envelope(*[1] * 41), *[b"z"] * 41],
        [envelope()],
        [envelope(0)],
        [envelope(4) + b"junk"],
        [envelope(4) + b"junkjunk"],
        [envelope(4, 4) + b"junkjunk"],
        [envelope(0xFFFFFFFF) + b"junk"],
        [envelope(*[0] * 15_000)],
        [envelope(100_000) + bytes(100_000)],
        [b"12345678\xff\xff\xff\xff" + bytes(1000)],
    ],
)
def test_messages_that_are_none(plain: str, parts: list[bytes]) -> None:
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.linger = 0
    peer.connect(f"tcp://{plain}")
    try:
        peer.send_multipart(parts)
        if len(parts[0]) >= 8:  # A request with a number is answered.
            assert peer.poll(10_000)
            envelope, *parts = peer.recv_multipart()
            assert envelope[:8] == b"12345678"
            assert unpack(unwrap(envelope, parts)).kind == "error"
        products(f"mlwe+zmq://{plain}?insecure=1")
    finally:
        peer.close(0)
        context.term()


def test_a_client_that_takes_no_replies_fills_only_its_own_quota(keys: Path) -> None:
    ZmqTransport.make_keys(keys, ("deaf",), worker=False)
    handler = Service(Worker(store()), Quota(requests=8, nbytes=4 << 20))
    try:
        with listening(handler, curve=str(keys)) as listener:
            deaf = link_to(f"mlwe+zmq://{listener.address}?curve={keys}&client=deaf")
            opening = Message("open", {"backend": "clear", "groups": [["0"]], "public": {}})
            name = deaf.submit(opening).result(60).fields["session"]
            x = torch.zeros(8000, 24)
            request = Message("evaluate", {"session": name, "group": 0, "direction": "forward"}, {"x": x})
            futures = [deaf.submit(request) for _ in range(40)]
            products(f"mlwe+zmq://{listener.address}?curve={keys}")
            codes = {future.result(60).fields.get("code") for future in futures}
            assert codes <= {None, "busy"}
            assert "busy" in codes
            deaf.close()
    finally:
        handler.close()


class Liar:
    """A worker that answers as it likes: a raw ROUTER."""

    def __init__(self, answer: Any) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"127.0.0.1:{port}"
        self.answer = answer
        self.running = True
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while self.running:
            if self.socket.poll(50):
                route, request, *_ = self.socket.recv_multipart()
                for parts in self.answer(request[:8]):
                    self.socket.send_multipart([route, *parts])

    def close(self) -> None:
        self.running = False
        self.thread.join(60)
        self.socket.close(0)
        self.context.term()


OK = pack(Message("ok"))[0]
LIES: dict[str, Any] = {
    "garbage": lambda number: [wrap(number, [b"\xc1garbage"], False)],
    "nothing": lambda number: [[number]],
    "an envelope that lies": lambda number: [[number + envelope(9)[8:], OK]],
    "a size that lies": lambda number: [[number + envelope(9)[8:] + bytes(OK)]],
    "buffers that are not there": lambda number: [
        wrap(number, pack(Message("ok", {}, {"y": torch.ones(3)}))[:1], False)
    ],
    "a huge shape": lambda number: [
        wrap(
            number,
            [
                pack(Message("ok", {}, {"y": torch.ones(3)}))[0].replace(b"\x91\x03", b"\x91\xce\x7f\xff\xff\xff"),  # type: ignore[union-attr]
                b"123",
            ],
            False,
        )
    ],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_answers_nonsense(lie: str) -> None:
    liar = Liar(LIES[lie])
    link = link_to(f"mlwe+zmq://{liar.address}?insecure=1")
    try:
        with pytest.raises(ReplyError, match="malformed reply"):
            link.submit(Message("hello")).result(60)
    finally:
        link.close()
        liar.close()


def test_replies_to_requests_that_were_never_made_are_ignored() -> None:
    def answer(number: bytes) -> list[list[Frame]]:
        good, other = (wrap(each, [OK], False) for each in (number, b"\xff" * 8))
        return [[b"", b"x"], other, [b"z"], good, good, good]

    liar = Liar(answer)
    link = link_to(f"mlwe+zmq://{liar.address}?insecure=1")
    try:
        for _ in range(5):
            assert link.submit(Message("hello")).result(60).kind == "ok"
    finally:
        link.close()
        liar.close()


def test_a_small_message_is_one_frame_in_which_tensors_are_aligned() -> None:
    tensors = {"b": torch.arange(5, dtype=torch.uint8), "x": torch.randn(7, 3, dtype=torch.float64)}
    (frame,) = wrap(b"12345678", pack(Message("ok", {"a": "b"}, {**tensors, "none": torch.empty(0, 4)})), True)
    assert isinstance(frame, bytes)
    assert frame[:8] == b"12345678"
    read = unpack(unwrap(frame, []))
    assert read.fields == {"a": "b"}
    assert all(torch.equal(read.buffers[name], tensor) for name, tensor in tensors.items())
    assert read.buffers["x"].data_ptr() % read.buffers["x"].element_size() == 0


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_the_largest_message_that_is_one_frame(spare: int) -> None:
    frames = [bytes(40), os.urandom(SMALL - 40 - 4 * ALIGNMENT + spare)]
    first, *parts = wrap(b"12345678", frames, True)
    assert len(parts) == (2 if spare > 0 else 0)
    assert len(first) <= SMALL
    assert [bytes(frame) for frame in unwrap(bytes(first), parts)] == frames


def test_envelopes() -> None:
    frames = [b"header", bytes(CHUNK), os.urandom(2 * CHUNK + 1), b"", bytes(PLAIN_CHUNK + 1)]
    for cut in (True, False):
        envelope, *parts = wrap(b"12345678", frames, cut)
        assert len(parts) == (6 + PLAIN_CHUNK // CHUNK + 1 if cut else 4 + 2)
        assert [bytes(frame) for frame in unwrap(bytes(envelope), parts)] == frames
        for wrong in (parts[:-1], [*parts, b""], []):
            with pytest.raises(ProtocolError, match="envelope"):
                unwrap(bytes(envelope), wrong)


@pytest.mark.slow
def test_a_slow_link_carries_what_takes_longer_than_the_signs_of_life(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciphertune_zmq.framing.PLAIN_CHUNK", 1 << 17)
    with listening(service, insecure=True, heartbeat=0.25) as listener, remote.proxy(listener.address) as slow:
        slow.delays = itertools.repeat(0.1)  # at most 64 KiB each: 2 MiB take more than 3 s, a piece 0.2 s
        link = link_to(f"mlwe+zmq://{slow.address}?insecure=1&heartbeat=0.25")
        request = Message("evaluate", {"session": "none"}, {"large": torch.zeros(2 << 20, dtype=torch.uint8)})
        assert link.submit(request).result(60).fields["code"] == "unknown-session"
        link.close()


def test_what_is_neither_small_nor_cut_is_not_copied() -> None:
    tensor = torch.arange(10_000)
    envelope, *parts = wrap(b"12345678", pack(Message("ok", {}, {"t": tensor})), True)
    read = unpack(unwrap(bytes(envelope), parts)).buffers["t"]
    assert read.data_ptr() == tensor.data_ptr()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    for attempt in (
        lambda: ZmqTransport().connect(("127.0.0.1:1",), None),
        lambda: ZmqTransport.listen(service, "127.0.0.1:*", {"insecure": True}),
    ):
        with pytest.raises(PluginError, match=r'pip install "ciphertune\[zmq\]"'):
            attempt()


def test_help_loads_no_wire() -> None:
    code = (
        "import sys\nfrom ciphertune.cli import cli\n"
        "cli.main(['worker', '--help'], standalone_mode=False)\n"
        "print('zmq' in sys.modules, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("False False")


def eventually(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_connections_are_told_apart_and_their_ends_are_told(keys: Path) -> None:
    handler = EchoHandler()
    with listening(handler, curve=str(keys)) as listener:
        links = [link_to(f"mlwe+zmq://{listener.address}?curve={keys}") for _ in range(2)]
        for link in (*links, *links):
            link.submit(Message("hello")).result(60)
        first, second = handler.connections[:2]
        assert handler.connections == [first, second, first, second]
        assert None not in handler.connections
        links[0].close()
        eventually(lambda: handler.gone)
        assert handler.gone == [(handler.peers[0], first)]
        links[1].close()
        # The next connection may get the descriptor of one that has just ended.
        again = link_to(f"mlwe+zmq://{listener.address}?curve={keys}")
        again.submit(Message("hello")).result(60)
        eventually(lambda: len(handler.gone) == 2)
        assert handler.gone[1][1] == second
        assert handler.connections[-1] not in (first, second)
        again.close()


_KILLED = """
import sys, time
import torch
import ciphertune
from torch import nn
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
model = ciphertune.outsource(network, sys.argv[1])
print("open", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_client_killed_outright_again_and_again_is_not_locked_out(service: Service, keys: Path) -> None:
    service.worker.opened.limits = SessionLimits(sessions=1)
    with listening(service, curve=str(keys)) as listener:
        to = f"mlwe+zmq://{listener.address}?curve={keys}"
        process = warm.start([to], code=_KILLED)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "open\n"
            # While it is there its session is its own.
            with pytest.raises(WorkerError, match="1 sessions of this client"):
                ciphertune.outsource(network(), f"{to}&{FAST}")
        finally:
            process.kill()
            process.wait(60)
            process.stdout.close()
        session_of(ciphertune.outsource(network(), to)).close()


def test_a_refused_client_knocks_rarely_and_its_address_is_told(keys: Path, tmp_path: Path) -> None:
    handler = EchoHandler()
    ZmqTransport.make_keys(tmp_path / "other", ("client",), worker=False)
    (tmp_path / "other" / "worker.pub").write_bytes((keys / "worker.pub").read_bytes())
    with listening(handler, curve=str(keys)) as listener:
        link = link_to(f"mlwe+zmq://{listener.address}?curve={tmp_path / 'other'}")
        begun, asked = time.monotonic(), 0
        while time.monotonic() < begun + 1.5:
            with pytest.raises(TransportError, match="refused this client"):
                link.submit(Message("hello")).result(60)
            asked += 1
            time.sleep(0.005)
        # 0.1 s and twice as long each time: about five within this time, where ZeroMQ alone would knock thirty times.
        assert asked > 20
        assert 1 <= len(handler.refusals) <= 8
        address, why = handler.refusals[0]
        assert address == "127.0.0.1"
        assert "is not authorised" in why
        (keys / "clients" / "other.pub").write_bytes((tmp_path / "other/clients/client.pub").read_bytes())

        def let_in() -> bool:
            try:
                return link.submit(Message("hello")).result(60).kind == "hello"
            except TransportError:
                return False

        eventually(let_in)
        link.close()


def test_what_is_no_handshake_is_told_with_its_address(keys: Path) -> None:
    handler = EchoHandler()
    with listening(handler, curve=str(keys)) as listener:
        host, _, port = listener.address.rpartition(":")
        for attempt in range(1, 21):
            with socket.create_connection((host, int(port))) as stranger:
                # Its address is that of a connection that is still there when it is looked at.
                time.sleep(0.1 * attempt)
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 8)
                stranger.settimeout(60)
                with contextlib.suppress(OSError):
                    while stranger.recv(100):
                        pass
            eventually(lambda count=attempt: len(handler.refusals) == count)
            address, why = handler.refusals[-1]
            assert "failed the handshake" in why
            if address == "127.0.0.1":
                break
        assert address == "127.0.0.1"


@pytest.mark.slow
def test_a_key_that_is_taken_out_ends_its_clients_sessions_and_no_others(service: Service, keys: Path) -> None:
    ZmqTransport.make_keys(keys, ("other",), worker=False)
    with listening(service, curve=str(keys)) as listener:
        to = f"clear+zmq://{listener.address}?curve={keys}&allow_insecure=1&weight_bits=8&deadline=2&timeout=1"
        revoked, stays = (ciphertune.outsource(network(), f"{to}&client={name}") for name in ("client", "other"))
        x = torch.randn(2, 24)
        with torch.no_grad():
            expected = stays(x)
            assert torch.equal(revoked(x), expected)
            (keys / "clients" / "client.pub").rename(keys / "client.away")
            eventually(lambda: service.load.sessions == 1)
            with pytest.raises(TransportError):
                revoked(x)
            assert torch.equal(stays(x), expected)
            # A client is let in again as soon as its key is.
            (keys / "client.away").rename(keys / "clients" / "client.pub")
            again = ciphertune.outsource(network(), f"{to}&client=client")
            assert torch.equal(again(x), expected)
        for model in (revoked, stays, again):
            session_of(model).close()


def test_threads_of_sockets_take_short_turns() -> None:
    """They have the processor at once when a message comes, whoever computes meanwhile: see ``take_turns``."""
    if (mine := turn_seconds()) == 0.0:
        pytest.skip("this system has one length of turns for all threads")
    turns: list[float] = []

    class Watched(EchoHandler):
        def submit(self, *given: Any, **more: Any) -> None:
            turns.append(turn_seconds())
            super().submit(*given, **more)

    with listening(Watched(), insecure=True) as listener:
        link = link_to(f"mlwe+zmq://{listener.address}?insecure=true")
        link.submit(Message("hello")).result(60)
        link.close()
    assert len(turns) == 1
    assert 0 < turns[0] < mine


class Part:
    """A frame as the listener's socket gives it."""

    def __init__(self, data: Frame, more: bool) -> None:
        self.bytes, self.buffer, self.more = bytes(data), memoryview(data), more

    def __len__(self) -> int:
        return len(self.bytes)

    def get(self, option: Any) -> Any:
        raise zmq.ZMQError(zmq.EINVAL)


def test_small_messages_come_after_large_ones_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last of them the listener's thread has nothing else to do: a short product is evaluated there."""
    took: list[tuple[int, bool]] = []

    class Watched(EchoHandler):
        def submit(self, frames: Any, *given: Any, idle: bool = False) -> None:
            took.append((sum(map(len, frames)), idle))

    with listening(Watched(), insecure=True) as listener:
        loop = listener._loop
    waiting: list[Part] = []
    for size in (10, SMALL, 20, 2 * SMALL):
        parts = [b"route", *wrap(bytes(8), [bytes(size)], False)]
        waiting += [Part(part, index + 1 < len(parts)) for index, part in enumerate(parts)]
    monkeypatch.setattr(loop, "socket", mock.Mock(recv=lambda *_, **__: waiting.pop(0)))
    monkeypatch.setattr(loop, "readable", lambda: bool(waiting))
    loop._receive()
    assert took == [(SMALL, False), (2 * SMALL, False), (10, False), (20, True)]
