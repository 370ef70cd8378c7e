"""The conformance suite of transports: what every one of them must do."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlencode

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune.client.choice import choose
from ciphertune.errors import SelectionError, TransportError
from ciphertune.plugins import registry
from ciphertune.protocol import Message, error_message
from ciphertune.testing.echo import EchoHandler
from ciphertune.testing.served import ServedWorker
from ciphertune.transport import INTERFACE_VERSION, Link, Listener, Loopback, Transport

_HOST_AND_PORT = re.compile(r"[^/]+:(\d+|\*)")
_NO_ADDRESSES = ("127.0.0.1:99999", "127.0.0.1:port")
_SECONDS = 60.0
"""Longer than any step takes; a test that waits so long has failed."""


def _until(condition: Callable[[], bool], seconds: float = _SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _resources() -> tuple[int, int]:
    """Count threads and open files of this process; files only where the system shows them."""
    folder = Path("/proc/self/fd")
    return threading.active_count(), len(list(folder.iterdir())) if folder.exists() else 0


class TransportSuite:
    """For transports that serve workers elsewhere: inherit, set ``name``, collect with pytest.

    Address and options come from the transport's ``loopback``.

    Attributes:
        name: the transport's entry-point name.
        options: of the client's selection string, as they stand in it (``insecure=1&heartbeat=1``).
        address: where to serve, with ``{folder}`` for a folder of the test; that of ``loopback`` if empty. So can a
            transport be tested over each kind of address that it knows.
        wrong_addresses: texts that are no addresses of this transport; if empty, some that no ``HOST:PORT`` is, for a
            transport whose addresses have this form.
        large: bytes of the largest buffer that is sent.
    """

    name: ClassVar[str]
    options: ClassVar[str] = ""
    address: ClassVar[str] = ""
    wrong_addresses: ClassVar[tuple[str, ...]] = ()
    large: ClassVar[int] = 40 << 20

    def loopback(self, folder: Path) -> Loopback:
        """Address and options to serve and connect on this machine; ``folder`` is for keys and certificates."""
        here = self._class().loopback(folder, dict(parse_qsl(self.options)))
        if self.address:
            here = dataclasses.replace(here, address=self.address.replace("{folder}", str(folder)))
        return here

    def listen(self, handler: Any, folder: Path, address: str | None = None) -> Listener:
        """Serve a handler at an address, that of ``loopback`` if none is given."""
        here = self.loopback(folder)
        return self._class().listen(handler, address or here.address, here.serve)

    def stranger(self, address: str) -> socket.socket | None:
        """A connected socket to a listener's address, as a stranger would have it; None where there can be none.

        As it stands for ``HOST:PORT``, and for paths of Unix sockets, with or without a scheme before them.
        """
        path = address.partition("://")[2] or address.removeprefix("unix:")
        if path.startswith("/") and Path(path).is_socket():
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(5)
            peer.connect(path)
            return peer
        host, _, port = address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=5) if host and port.isdigit() else None

    def _class(self) -> type[Transport]:
        return registry.get_transport(self.name)

    def selection(self, backend: str, address: str, folder: Path, **more: object) -> str:
        """A selection string for a worker at an address."""
        options = {**dict(parse_qsl(self.options)), **self.loopback(folder).connect, **more}
        return f"{backend}+{self.name}://{address}" + ("?" + urlencode(options) if options else "")

    def link(self, address: str, folder: Path) -> Link:
        """A link to the worker at an address."""
        choice = choose(self.selection("clear", address, folder, allow_insecure=1))
        (link,) = choice.transport.connect(choice.selection.endpoints, None)
        return link

    @pytest.fixture
    def handler(self) -> EchoHandler:
        """The handler that answers requests."""
        return EchoHandler()

    @pytest.fixture
    def listener(self, handler: EchoHandler, tmp_path: Path) -> Iterator[Listener]:
        """A listener that hands requests to ``handler``."""
        listener = self.listen(handler, tmp_path)
        yield listener
        listener.close()

    @pytest.fixture
    def connected(self, listener: Listener, tmp_path: Path) -> Iterator[Link]:
        """A link to ``listener``."""
        link = self.link(listener.address, tmp_path)
        yield link
        link.close()

    def test_it_says_which_interface_it_is_written_for(self) -> None:
        """``Transport.interface`` is the version of the interface that it was written for."""
        stated = self._class().interface
        if stated is None:
            pytest.skip(f"it does not say: interface = {INTERFACE_VERSION}")
        assert stated == INTERFACE_VERSION

    def test_messages_arrive_as_they_were(self, connected: Link) -> None:
        """Fields and buffers of every type arrive, also without elements."""
        fields = {"none": None, "flag": True, "n": -7, "x": 0.1, "text": "naïve", "raw": b"\0\xff", "list": [1, [2]]}
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
        buffers = {f"b{i}": torch.arange(-3, 3).to(kind).reshape(2, 3) for i, kind in enumerate(kinds)}
        buffers |= {"empty": torch.zeros(0, 5), "one": torch.ones(1), "strided": torch.arange(12.0).reshape(3, 4).t()}
        reply = connected.submit(Message("evaluate", fields, buffers)).result(_SECONDS)
        assert reply.kind == "evaluate"
        assert reply.fields == fields
        assert list(reply.buffers) == list(buffers)
        for name, sent in buffers.items():
            assert reply.buffers[name].dtype == sent.dtype
            assert torch.equal(reply.buffers[name], sent)

    def test_messages_without_anything(self, connected: Link) -> None:
        """A message without fields and buffers arrives."""
        assert connected.submit(Message("hello")).result(_SECONDS) == Message("hello")

    def test_large_messages(self, connected: Link, handler: EchoHandler) -> None:
        """Large buffers arrive, also of sizes that no chunk divides; a reply that has left is released."""
        generator = torch.Generator().manual_seed(0)
        sizes = (self.large, (1 << 20) + 1, (1 << 19) - 1, 1)
        sent = {str(n): torch.randint(256, (n,), dtype=torch.uint8, generator=generator) for n in sizes}
        for _ in range(2):
            reply = connected.submit(Message("ok", {}, sent)).result(3 * _SECONDS)
            assert all(torch.equal(reply.buffers[name], sent[name]) for name in sent)
        assert _until(lambda: handler.released == 2)

    def test_answers_in_any_order(self, connected: Link, handler: EchoHandler) -> None:
        """Many requests are under way at once, and each gets its own reply."""
        handler.hold = True
        futures = [connected.submit(Message("ok", {"n": n}, {"x": torch.full((n,), n)})) for n in range(60)]
        assert _until(lambda: len(handler.kept) == 60), "a request waits for the reply to another one"
        assert not any(future.done() for future in futures)
        handler.answer(backwards=True)
        for n, future in enumerate(futures):
            reply = future.result(_SECONDS)
            assert reply.fields["n"] == n
            assert torch.equal(reply.buffers["x"], torch.full((n,), n))

    def test_threads_share_a_link(self, connected: Link) -> None:
        """Eight threads submit forty requests each over one link."""
        wrong: list[object] = []

        def run(thread: int) -> None:
            for n in range(40):
                try:
                    fields = connected.submit(Message("ok", {"n": n, "thread": thread})).result(_SECONDS).fields
                except Exception as error:
                    wrong.append(error)
                    return
                if fields != {"n": n, "thread": thread}:
                    wrong.append(fields)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * _SECONDS)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong

    def test_errors_are_replies(self, connected: Link) -> None:
        """An error message of the worker is a result, not an exception."""
        reply = connected.submit(error_message("quota", "no more")).result(_SECONDS)
        assert reply.kind == "error"

    def test_a_request_can_be_given_up(self, connected: Link, handler: EchoHandler) -> None:
        """The late reply to a cancelled request is ignored."""
        handler.hold = True
        given_up = connected.submit(Message("ok", {"n": 1}))
        assert _until(lambda: len(handler.kept) == 1)
        assert given_up.cancel(), "the future cannot be cancelled while its answer is awaited"
        kept = connected.submit(Message("ok", {"n": 2}))
        assert _until(lambda: len(handler.kept) == 2)
        handler.answer()
        assert kept.result(_SECONDS).fields == {"n": 2}

    def test_a_link_that_is_closed(self, connected: Link, handler: EchoHandler) -> None:
        """Closing fails pending requests at once, and later ones too. Closing twice is fine."""
        handler.hold = True
        waiting = connected.submit(Message("hello"))
        assert _until(lambda: len(handler.kept) == 1)
        connected.close()
        connected.close()
        with pytest.raises(TransportError):
            waiting.result(_SECONDS)
        with pytest.raises(TransportError):
            connected.submit(Message("hello")).result(_SECONDS)
        handler.answer()

    def test_a_worker_that_goes_and_comes_back(self, handler: EchoHandler, tmp_path: Path) -> None:
        """Requests under way fail once the worker is gone; the same link serves again once it is back."""
        listener = self.listen(handler, tmp_path)
        link = self.link(listener.address, tmp_path)
        try:
            assert link.submit(Message("hello")).result(_SECONDS).kind == "hello"
            handler.hold = True
            waiting = link.submit(Message("hello"))
            assert _until(lambda: len(handler.kept) == 1)
            listener.close()
            listener.close()
            with pytest.raises(TransportError):
                waiting.result(_SECONDS)
            handler.hold = False
            again = self.listen(handler, tmp_path, listener.address)
            try:
                assert _until(lambda: self._answers(link)), "the link did not connect again"
            finally:
                again.close()
        finally:
            link.close()

    @staticmethod
    def _answers(link: Link) -> bool:
        with contextlib.suppress(TransportError):
            return link.submit(Message("hello")).result(_SECONDS).kind == "hello"
        return False

    def test_no_worker_there(self, listener: Listener, tmp_path: Path) -> None:
        """Without a worker a link opens and takes a request without waiting; the request fails or stays pending."""
        address = listener.address
        listener.close()
        start = time.monotonic()
        link = self.link(address, tmp_path)
        future = link.submit(Message("hello"))
        assert time.monotonic() - start < _SECONDS / 4, "connecting or submitting waits for the worker"
        try:
            with pytest.raises((TransportError, TimeoutError)):
                future.result(2)
        finally:
            link.close()
        assert future.done()

    def test_clients_are_told_apart(
        self, connected: Link, listener: Listener, handler: EchoHandler, tmp_path: Path
    ) -> None:
        """Every request names a peer, and one client's answers never go to another."""
        other = self.link(listener.address, tmp_path)
        try:
            handler.hold = True
            futures = [link.submit(Message("ok", {"n": n})) for n, link in enumerate((connected, other) * 5)]
            assert _until(lambda: len(handler.kept) == 10)
            handler.answer(backwards=True)
            assert [future.result(_SECONDS).fields["n"] for future in futures] == list(range(10))
            assert all(handler.peers)
        finally:
            other.close()

    def test_other_peers_do_no_harm(self, connected: Link, listener: Listener) -> None:
        """Peers on a TCP port or a Unix socket that send nonsense, or nothing, or disconnect, do no harm."""
        first = self.stranger(listener.address)
        if first is None:
            pytest.skip(f"no stranger can reach {listener.address!r} by a socket; override 'stranger' if one can")
        first.close()
        noise = bytes(
            torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).tolist()
        )
        held = []
        for sent in (
            b"",
            b"\0",
            noise,
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
            b"\xff" * 4096,
        ):
            peer = self.stranger(listener.address)
            assert peer is not None
            held.append(peer)
            with contextlib.suppress(OSError):
                peer.sendall(sent)
        assert connected.submit(Message("hello")).result(_SECONDS).kind == "hello"
        for peer in held:
            peer.close()
        assert connected.submit(Message("hello")).result(_SECONDS).kind == "hello"

    def test_requests_over_the_limits(self, connected: Link, handler: EchoHandler) -> None:
        """A request over the limits is refused: the client gets an error, memory stays bounded, the link goes on."""
        size = 2 * handler.limits.total_bytes + 1
        future = connected.submit(Message("ok", {}, {"x": torch.zeros(size, dtype=torch.uint8)}))
        with contextlib.suppress(TransportError):
            assert future.result(3 * _SECONDS).kind == "error"
        assert handler.largest < size, "the handler was handed a request of twice its limits"
        assert _until(lambda: self._answers(connected)), "the link fails afterwards"

    def test_nothing_is_left_behind(self, listener: Listener, tmp_path: Path) -> None:
        """Links that come and go leave neither threads nor open files."""

        def once() -> None:
            link = self.link(listener.address, tmp_path)
            assert link.submit(Message("hello")).result(_SECONDS).kind == "hello"
            link.close()

        for _ in range(3):
            once()
        gc.collect()
        threads, files = _resources()
        for _ in range(15):
            once()
        gc.collect()

        def settled() -> bool:
            now = _resources()
            return now[0] <= threads + 3 and now[1] <= files + 6

        assert _until(settled), f"threads and files {(threads, files)} became {_resources()}"

    def test_wrong_addresses_and_options(self, handler: EchoHandler, tmp_path: Path) -> None:
        """Wrong addresses and options raise an error where they are given."""
        here = self.loopback(tmp_path)
        wrong = self.wrong_addresses or (_NO_ADDRESSES if _HOST_AND_PORT.fullmatch(here.address) else ())
        for address in wrong:
            try:
                listener = self.listen(handler, tmp_path, address)
            except (SelectionError, TransportError):
                continue
            listener.close()
            pytest.fail(f"{address!r} was accepted as an address to serve at (wrong_addresses says which are none)")
        with pytest.raises(SelectionError):
            self._class().listen(handler, here.address, {**here.serve, "no_such_option": "1"})
        with pytest.raises(SelectionError):
            choose(self.selection("clear", "127.0.0.1:1", tmp_path, allow_insecure=1, no_such_option=1))

    def test_a_model_trains_as_it_does_locally(self, tmp_path: Path) -> None:
        """Losses and gradients through a worker equal those in this process, bit for bit."""

        def network() -> nn.Sequential:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))

        def losses(to: str) -> list[float]:
            model = ciphertune.outsource(network(), to)
            x, target = torch.randn(16, 12), torch.randint(0, 3, (16,))
            optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
            curve = []
            try:
                for _ in range(6):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x), target)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    curve.append(loss.item())
            finally:
                ciphertune.session_of(model).close()
            return curve

        where = self.address.replace("{folder}", str(tmp_path))
        with ServedWorker(network(), self.name, tmp_path, options=self.options, address=where) as served:
            assert losses(served.selection("clear", allow_insecure=1, weight_bits=8)) == losses("clear?weight_bits=8")
            assert served.service.load.sessions == 0
