"""The conformance suite of transports that wrap another: what every one of them must leave as it is."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlencode

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune._support.options import build_options
from ciphertune.client.choice import choose
from ciphertune.errors import ReplyError, SelectionError, TransportError
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.testing.served import ServedWorker
from ciphertune.transport import CHAIN, Link, Loopback, PendingReplies, Transport, WrappingTransport

_SECONDS = 60.0
"""Longer than any step takes; a test that waits so long has failed."""


class _InnerLink(Link):
    """Answers when it is told to, and tells what came."""

    def __init__(self, name: str) -> None:
        self.name, self.identity = name, f"key of {name}"
        self.pending: PendingReplies[Message] = PendingReplies(name)
        self.came: list[tuple[int, Message, Future[Message]]] = []
        self.closed = 0

    def submit(self, request: Message) -> Future[Message]:
        number, future = self.pending.add()
        self.came.append((number, request, future))
        return future

    def close(self) -> None:
        self.closed += 1
        self.pending.close()


@dataclasses.dataclass(frozen=True)
class _InnerOptions:
    far: bool = True
    inner_words: tuple[str, ...] = ()


class _Inner(Transport):
    """Whether it is remote depends on an option."""

    name = "inner"
    Options = _InnerOptions
    ServeOptions = _InnerOptions
    joining_seconds = 0.25
    links: ClassVar[list[_InnerLink]]
    told: ClassVar[list[Any]]

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.remote = self.elastic = self.options.far

    def connect(self, endpoints: tuple[str, ...], worker: Any) -> Sequence[Link]:
        self.told.append((endpoints, worker))
        self.links.extend(_InnerLink(endpoint) for endpoint in endpoints)
        return list(self.links)

    def check(self, endpoints: tuple[str, ...]) -> None:
        self.told.append(endpoints)
        if "wrong" in endpoints:
            raise SelectionError("wrong address")

    def joining_workers(self, endpoints: tuple[str, ...], links: Sequence[Link]) -> Sequence[Link]:
        known = {link.name for link in links}
        return [_InnerLink(name) for name in ("a", "joined") if name not in known]

    @classmethod
    def loopback(cls, folder: Path, options: Any) -> Loopback:
        return Loopback("here", {"far": "0"}, {"far": "1"})


class WrappingSuite:
    """For transports that wrap another: inherit, set ``name``, collect with pytest.

    What the wrapped links do beside carrying messages, only the plugin's own tests can say. ``TransportSuite`` with
    ``name = "yours::zmq"`` is the other half.

    Attributes:
        name: the transport's entry-point name.
        options: of it, as they stand in a selection string, with which every message arrives.
        wire: the transport that it is put around where a worker is elsewhere.
    """

    name: ClassVar[str]
    options: ClassVar[str] = ""
    wire: ClassVar[str] = "zmq"

    def _around(self, inner: type[Transport] = _Inner) -> type[Transport]:
        wrapping = registry.load(registry.TRANSPORTS, self.name)
        assert issubclass(wrapping, WrappingTransport), f"{self.name} is no ciphertune.transport.WrappingTransport"
        found: type[Transport] = wrapping.around(inner)
        return found

    def _made(self, **options: Any) -> tuple[Transport, type[_Inner]]:
        """The transport around an inner one with memory of its own."""
        inner = type("Inner", (_Inner,), {"links": [], "told": []})
        cls = self._around(inner)
        own = build_options(registry.load(registry.TRANSPORTS, self.name).Options, dict(parse_qsl(self.options)))
        values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        return cls(cls.Options(**values, **options)), inner

    def _link(self) -> tuple[Link, _InnerLink]:
        transport, inner = self._made()
        (link,) = transport.connect(("a",), None)
        return link, inner.links[0]

    def test_it_needs_another(self) -> None:
        """Alone it carries nothing, and says so where a selection string names it alone."""
        with pytest.raises(SelectionError, match=CHAIN):
            choose(f"mlwe+{self.name}://127.0.0.1:5555")
        with pytest.raises(SelectionError):
            choose(f"mlwe+{self.name}{CHAIN}no-such-transport://127.0.0.1:5555")

    @pytest.mark.parametrize("far", [False, True])
    def test_what_belongs_to_the_inner_transport(self, far: bool) -> None:
        """Whether requests leave this process, and whether workers join, is as the inner transport's instance says."""
        transport, _ = self._made(far=far)
        assert (transport.remote, transport.elastic, transport.joining_seconds) == (far, far, 0.25)

    def test_addresses_and_the_embedded_worker_pass_through(self) -> None:
        """As they stand in the selection string; a check of them is the inner transport's, with its errors."""
        transport, inner = self._made()
        worker: Any = object()
        links = transport.connect(("a", "b"), worker)
        assert inner.told == [(("a", "b"), worker)]
        assert [link.name for link in links] == ["a", "b"]
        assert [link.identity for link in links] == ["key of a", "key of b"], "exclusions go by what a link proves"
        transport.check(("a",))
        with pytest.raises(SelectionError, match="wrong address"):
            transport.check(("wrong",))
        for link in links:
            link.close()

    def test_workers_that_join_are_wrapped(self) -> None:
        """The inner transport knows those that are there by name; whoever is new is wrapped as all others."""
        transport, _ = self._made()
        (link,) = transport.connect(("a",), None)
        (joined,) = transport.joining_workers(("a",), [link])
        assert (joined.name, joined.identity) == ("joined", "key of joined")
        assert type(joined) is type(link)
        link.close()
        joined.close()

    def test_replies_and_errors_pass_through(self) -> None:
        """A request arrives as it was, with its bounds; replies and errors are those of the inner link."""
        link, inner = self._link()
        request = Message("evaluate", {"n": 1}, {"x": torch.arange(3)})
        replies = [link.submit(request), link.submit(Message("hello")), link.submit(Message("hello"))]
        assert [message.kind for _, message, _ in inner.came] == ["evaluate", "hello", "hello"]
        assert torch.equal(inner.came[0][1].buffers["x"], torch.arange(3))
        assert inner.came[0][1].reply_bytes == request.reply_bytes
        answer = Message("ok", {"n": 2}, {"y": torch.ones(2)})
        inner.pending.answer(inner.came[0][0], answer)
        inner.pending.fail(inner.came[1][0], "gone")
        inner.pending.fail(inner.came[2][0], ReplyError("malformed"))
        assert replies[0].result(_SECONDS) == answer
        with pytest.raises(TransportError, match="gone"):
            replies[1].result(_SECONDS)
        with pytest.raises(ReplyError, match="malformed"):
            replies[2].result(_SECONDS)
        link.close()

    def test_answers_in_any_order_from_any_thread(self) -> None:
        """Each request gets its own reply."""
        link, inner = self._link()
        replies = [link.submit(Message("ok", {"n": n})) for n in range(50)]
        threads = [
            threading.Thread(target=inner.pending.answer, args=(number, request))
            for number, request, _ in reversed(inner.came)
        ]
        for thread in threads:
            thread.start()
        assert [reply.result(_SECONDS).fields["n"] for reply in replies] == list(range(50))
        for thread in threads:
            thread.join()
        link.close()

    def test_a_request_that_is_given_up(self) -> None:
        """Cancelling the future cancels the inner one, so that nothing is left of the request anywhere."""
        link, inner = self._link()
        reply = link.submit(Message("hello"))
        assert reply.cancel(), "the future cannot be cancelled while its answer is awaited"
        assert inner.came[0][2].cancelled(), "the inner link still waits for the answer"
        assert len(inner.pending) == 0
        link.close()

    def test_a_link_that_is_closed(self) -> None:
        """Closing closes the inner link and fails what is under way; later requests fail. Closing twice is fine."""
        link, inner = self._link()
        waiting = link.submit(Message("hello"))
        link.close()
        link.close()
        assert inner.closed >= 1
        for future in (waiting, link.submit(Message("hello"))):
            with pytest.raises(TransportError):
                future.result(_SECONDS)

    def test_options_of_both(self) -> None:
        """Each reads its own from one selection string; one that both have is the inner's under the inner's name."""
        cls = self._around()
        names = {field.name for field in dataclasses.fields(cls.Options)}
        own = {field.name for field in dataclasses.fields(registry.load(registry.TRANSPORTS, self.name).Options)}
        assert names == own | {"far", "inner_words"}
        twice = self._around(cls)
        assert {field.name for field in dataclasses.fields(twice.Options)} == names | {f"{self.name}_{n}" for n in own}
        with pytest.raises(SelectionError, match="no_such_option"):
            choose(f"mlwe+{self.name}{CHAIN}local://?no_such_option=1")

    def test_serving_is_the_inner_transports(self, tmp_path: Path) -> None:
        """A worker's side knows nothing of what is put around a client's links."""
        cls = self._around()
        assert cls.ServeOptions is _InnerOptions
        assert cls.loopback(tmp_path, {}) == _Inner.loopback(tmp_path, {})

    @pytest.mark.parametrize("around", ["local", "wire"])
    def test_a_model_trains_as_it_does_without(self, around: str, tmp_path: Path) -> None:
        """Losses over the transport equal those in this process, bit for bit."""
        options = dict(parse_qsl(self.options))
        expected = self._losses("clear?weight_bits=8")
        if around == "local":
            query = urlencode({**options, "weight_bits": "8"})
            assert self._losses(f"clear+{self.name}{CHAIN}local://?{query}") == expected
            return
        name = f"{self.name}{CHAIN}{self.wire}"
        with ServedWorker(self._network(), name, tmp_path, options=self.options) as served:
            assert self._losses(served.selection("clear", allow_insecure=1, weight_bits=8)) == expected
            assert served.service.load.sessions == 0

    @staticmethod
    def _network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))

    def _losses(self, to: str) -> list[float]:
        model = ciphertune.outsource(self._network(), to, "all")
        x, target = torch.randn(16, 12).requires_grad_(), torch.randint(0, 3, (16,))
        curve = []
        try:
            for _ in range(4):
                loss = nn.functional.cross_entropy(model(x), target)
                (gradient,) = torch.autograd.grad(loss, x)
                x = (x - gradient).detach().requires_grad_()
                curve.append(loss.item())
        finally:
            ciphertune.session_of(model).close()
        return curve
