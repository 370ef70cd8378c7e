"""The transport suite over HTTP and HTTPS, tokens, and training under encryption."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import httpx
import pytest
import torch
from torch import nn

import ciphertune
from ciphertune import KeyFileError, SecurityError, SelectionError, TransportError
from ciphertune.errors import ReplyError
from ciphertune.protocol import Frame, Limits, Message, pack, unpack
from ciphertune.testing import EchoHandler, ServedWorker, TransportSuite
from ciphertune.transport import Reply
from ciphertune_http import HttpOptions, HttpsTransport, HttpTransport, body, read_address
from ciphertune_http.tokens import AuthorisedClients, make_token, read_token


class TestHttp(TransportSuite):
    name = "http"


class TestHttps(TransportSuite):
    name = "https"


HTTPS = TestHttps()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))


@pytest.fixture
def worker(ciphertune_worker: Callable[..., ServedWorker]) -> ServedWorker:
    return ciphertune_worker(network(), "https", limits=Limits(buffer_bytes=8 << 20, total_bytes=8 << 20))


def losses(to: str) -> list[float]:
    model = ciphertune.outsource(network(), to, layers=["0", "2"])
    x = torch.randn(64, 24)
    target = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    curve = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    ciphertune.session_of(model).close()
    return curve


def test_training_under_encryption(worker: ServedWorker) -> None:
    found = losses(worker.selection("mlwe"))
    assert found[-1] < 0.9 * found[0]
    assert found == pytest.approx(losses("mlwe"), rel=0.02)


def test_tokens_decide(worker: ServedWorker, tmp_path: Path) -> None:
    make_token(tmp_path / "stranger.token", tmp_path / "others.txt", "stranger")
    options = HttpOptions(str(tmp_path / "stranger.token"), str(tmp_path / "worker.crt"))
    (link,) = HttpsTransport(options).connect((worker.address,), None)
    with pytest.raises(TransportError, match="token"):
        link.submit(Message("hello")).result(60)
    link.close()


def test_authorities_decide(worker: ServedWorker, tmp_path: Path) -> None:
    """Without the private authority's certificate the worker is not trusted, and no token is sent."""
    (link,) = HttpsTransport(HttpOptions(str(tmp_path / "client.token"))).connect((worker.address,), None)
    with pytest.raises(TransportError, match="certificate verify failed"):
        link.submit(Message("hello")).result(60)
    link.close()


def test_peers_are_named_by_their_token(tmp_path: Path) -> None:
    handler = EchoHandler()
    listener = HTTPS.listen(handler, tmp_path)
    link = HTTPS.link(listener.address, tmp_path)
    link.submit(Message("hello")).result(60)
    link.close()
    listener.close()
    assert handler.peers == ["client"]


def first_line(address: str, folder: Path, sent: bytes) -> bytes:
    host, port = read_address(address)
    context = ssl.create_default_context(cafile=str(folder / "worker.crt"))
    with (
        socket.create_connection((host, port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname=host) as peer,
    ):
        peer.sendall(sent)
        return peer.recv(4096).partition(b"\r\n")[0]


def test_what_the_server_says_to_others(worker: ServedWorker, tmp_path: Path) -> None:
    token = read_token(str(tmp_path / "client.token"))
    known = {"Authorization": f"Bearer {token}"}
    url = f"https://{worker.address}"
    with httpx.Client(verify=ssl.create_default_context(cafile=str(tmp_path / "worker.crt")), trust_env=False) as http:
        assert http.get(url + "/").status_code == 404
        assert http.get(url + body.PATH).status_code == 405
        assert http.post(url + body.PATH, content=b"x").status_code == 401
        assert http.post(url + body.PATH, content=b"x", headers={"Authorization": "Bearer x"}).status_code == 401
        assert http.post(url + body.PATH, content=iter([b"x"]), headers=known).status_code == 411
        for size in (str(1 << 50), "9" * 400):
            # httpx itself would not send less than it announces; the answer must not wait for the body.
            lines = (
                f"POST {body.PATH} HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {token}",
                f"Content-Length: {size}",
            )
            head = "\r\n".join((*lines, "", ""))
            assert first_line(worker.address, tmp_path, head.encode()).split()[1] in (b"413", b"400")
    for content in (b"", b"\1\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0" + b"\xff" * 8, b"\0\0\0\0"):
        with httpx.Client(
            verify=ssl.create_default_context(cafile=str(tmp_path / "worker.crt")), trust_env=False
        ) as http:
            reply = http.post(url + body.PATH, content=content, headers=known)
            assert reply.status_code == 200
            assert b"error" in reply.content


def test_no_token_in_the_clear(tmp_path: Path) -> None:
    HttpTransport.loopback(tmp_path, {})
    with pytest.raises(SecurityError, match="https"):
        HttpTransport(HttpOptions(str(tmp_path / "client.token"))).connect(("example.org:80",), None)
    with pytest.raises(SelectionError, match="token=FILE"):
        HttpsTransport().connect(("example.org:443",), None)
    with pytest.raises(SecurityError):
        HttpTransport.listen(object(), "0.0.0.0:0", {"tokens": str(tmp_path / "tokens.txt")})
    with pytest.raises(SelectionError, match="certificate"):
        HttpsTransport.listen(object(), "127.0.0.1:0", {"tokens": str(tmp_path / "tokens.txt")})


def test_token_files(tmp_path: Path) -> None:
    HttpTransport.loopback(tmp_path, {})
    path = tmp_path / "client.token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = path.read_text().strip()
    listed = (tmp_path / "tokens.txt").read_text()
    assert secret not in listed
    assert AuthorisedClients(str(tmp_path / "tokens.txt")).name(f"Bearer {secret}".encode()) == "client"
    with pytest.raises(KeyFileError):
        make_token(path, tmp_path / "tokens.txt", "ward-7")
    with pytest.raises(KeyFileError, match="one word"):
        make_token(tmp_path / "other", tmp_path / "tokens.txt", "two words")
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod"):
        read_token(str(path))
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(KeyFileError, match="no token"):
        read_token(str(path))
    for text in ("", "name", "name abc"):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(KeyFileError):
            AuthorisedClients(str(tmp_path / "bad.txt"))


def test_tokens_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ciphertune_http", "ward-7"]
    for code in (0, 1):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ)
        assert done.returncode == code, done.stderr
    assert "client.token" in done.stderr
    assert read_token(str(tmp_path / "client.token")) not in done.stdout + done.stderr


def test_pinned_certificates(tmp_path: Path) -> None:
    """The key is its owner's alone, and the certificate stands strict verification."""
    here = HttpsTransport.loopback(tmp_path, {})
    assert HttpsTransport.loopback(tmp_path, {}) == here
    assert stat.S_IMODE((tmp_path / "worker.pem").stat().st_mode) == 0o600
    assert "PRIVATE" not in (tmp_path / "worker.crt").read_text()
    listener = HttpsTransport.listen(EchoHandler(), here.address, here.serve)
    context = ssl.create_default_context(cafile=here.connect["ca"])
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with httpx.Client(verify=context, trust_env=False) as http:
        assert http.get(f"https://{listener.address}/").status_code == 404
    listener.close()


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:http", "host:99999", "u@host:1", "h:1/path", "a b:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(SelectionError):
        read_address(text)


def test_addresses() -> None:
    assert read_address("example.org:443") == ("example.org", 443)
    assert read_address("[::1]:80") == ("::1", 80)


class Bloated(EchoHandler):
    """A worker that answers with as many bytes as a request's field says."""

    def submit(
        self, frames: Sequence[Frame], peer: str, reply: Reply, connection: Hashable = None, *, idle: bool = False
    ) -> None:
        size = int(unpack(frames).fields["size"])
        reply(pack(Message("ok", {}, {"y": torch.zeros(size, dtype=torch.uint8)})), lambda: None)


PLAIN = TestHttp()


def test_a_client_takes_no_longer_reply_than_it_asked_for(tmp_path: Path) -> None:
    listener = PLAIN.listen(Bloated(), tmp_path)
    link = PLAIN.link(listener.address, tmp_path)
    try:
        for size in (1000, 4 << 20, 1001, 1000):
            future = link.submit(Message("evaluate", {"size": size}, reply_bytes=1000))
            if size == 1000:
                assert future.result(60).buffers["y"].nbytes == size
            else:
                with pytest.raises(ReplyError):
                    future.result(60)
    finally:
        link.close()
        listener.close()


@pytest.mark.parametrize("suite", [PLAIN, HTTPS], ids=["http", "https"])
def test_silent_strangers_keep_no_client_out(suite: TransportSuite, tmp_path: Path) -> None:
    """300 connections without a token, of which none says a word, some of them before TLS."""
    listener = suite.listen(EchoHandler(), tmp_path)
    link = suite.link(listener.address, tmp_path)
    silent = []
    try:
        for _ in range(300):
            silent.append(socket.create_connection(read_address(listener.address), 10))
        for _ in range(3):
            for _attempt in range(40):
                try:
                    assert link.submit(Message("hello")).result(10).kind == "hello"
                except TransportError:
                    time.sleep(0.1)
                else:
                    break
            else:
                pytest.fail("no answer with silent strangers")
        # Those that are left are closed, one after the other.
        assert _closed(silent) >= 300 - 256
    finally:
        for each in silent:
            each.close()
        link.close()
        listener.close()


def _closed(sockets: list[socket.socket]) -> int:
    count = 0
    for each in sockets:
        each.setblocking(False)
        try:
            count += each.recv(1) == b""
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


def _request(token: str, length: int) -> bytes:
    head = f"POST {body.PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode()


class Metered(EchoHandler):
    """Lets requests of 4 MiB in at a time."""

    limits = Limits(buffer_bytes=4 << 20, total_bytes=4 << 20)

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._counting = threading.Lock()

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None] | None:
        with self._counting:
            if self.nbytes + nbytes > self.limits.total_bytes:
                return None
            self.nbytes += nbytes

        def give_back() -> None:
            with self._counting:
                self.nbytes -= nbytes

        return give_back


def test_quota_is_reserved_before_a_body_is_read(tmp_path: Path) -> None:
    """Unfinished bodies hold no more than their client may have."""
    handler = Metered()
    listener = PLAIN.listen(handler, tmp_path)
    token = read_token(str(tmp_path / "client.token"))
    held = []
    try:
        size = 3 << 20
        for number in range(4):
            peer = socket.create_connection(read_address(listener.address), 10)
            held.append(peer)
            peer.sendall(_request(token, size) + bytes(size - 1))
            if number == 0:
                end = time.monotonic() + 10
                while not handler.nbytes and time.monotonic() < end:
                    time.sleep(0.01)
        for refused in held[1:]:
            refused.settimeout(10)
            answer = b""
            while b"busy" not in answer and (part := refused.recv(4096)):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"busy" in answer
        assert handler.nbytes == size
    finally:
        for each in held:
            each.close()
        end = time.monotonic() + 10
        while handler.nbytes and time.monotonic() < end:
            time.sleep(0.01)
        assert handler.nbytes == 0, "a body that never comes gives its quota back"
        listener.close()


def test_slow_bytes_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and bodies that come a byte at a time."""
    monkeypatch.setattr("ciphertune_http.server._HEAD_SECONDS", 0.5)
    monkeypatch.setattr("ciphertune_http.server._BODY_SECONDS", 0.5)
    handler = EchoHandler()
    listener = PLAIN.listen(handler, tmp_path)
    token = read_token(str(tmp_path / "client.token"))
    address = read_address(listener.address)
    try:
        with socket.create_connection(address, 10) as head, socket.create_connection(address, 10) as late:
            head.sendall(b"POST / HTTP/1.1\r\nX:")
            late.sendall(_request(token, 1000) + b"x")
            assert head.recv(100) == b"", "headers that do not end"
            assert late.recv(100).startswith(b"HTTP/1.1 408"), "a body that does not end"
        assert handler.peers == []
    finally:
        listener.close()


def test_connections_and_their_ends_and_tokens_that_are_taken_out(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    for name in ("one", "two"):
        make_token(tmp_path / f"{name}.token", tokens, name)
    handler = EchoHandler()
    listener = HttpTransport.listen(handler, "127.0.0.1:0", {"tokens": str(tokens)})

    def eventually(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    try:
        (link,) = HttpTransport(HttpOptions(str(tmp_path / "one.token"))).connect((listener.address,), None)
        for _ in range(2):
            link.submit(Message("hello")).result(60)
        assert len(set(handler.connections)) == 1
        link.close()
        eventually(lambda: handler.gone)
        assert handler.gone == [("one", handler.connections[0])]
        lines = tokens.read_text().splitlines()
        tokens.write_text("\n".join(line for line in lines if not line.startswith("one ")))
        eventually(lambda: handler.dismissed)
        assert handler.dismissed == ["one"]
        (link,) = HttpTransport(HttpOptions(str(tmp_path / "one.token"))).connect((listener.address,), None)
        with pytest.raises(TransportError, match="token"):
            link.submit(Message("hello")).result(60)
        assert handler.refusals == [("127.0.0.1", "its token is not authorised")]
        link.close()
        tokens.write_text("damaged")
        (link,) = HttpTransport(HttpOptions(str(tmp_path / "two.token"))).connect((listener.address,), None)
        time.sleep(0.7)
        assert link.submit(Message("hello")).result(60).kind == "hello"
        link.close()
    finally:
        listener.close()
