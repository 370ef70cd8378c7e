"""The built-in backends and transports pass the suites that plugins are given, and what is broken does not."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from ciphertune.backend import (
    Backend,
    Buffers,
    ClientHalf,
    Encrypted,
    LinearMap,
    NoiseModel,
    SecurityStatement,
    WeightBits,
    WorkerHalf,
)
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.testing import BackendSuite, EchoHandler, TransportSuite, WrappingSuite
from ciphertune.testing.backends import Pair
from ciphertune.transport import Link, Transport, WrappingTransport

ClearBackend = registry.load(registry.BACKENDS, "clear")
MLWEBackend = registry.load(registry.BACKENDS, "mlwe")


class TestClear(BackendSuite):
    selection = "clear"
    deterministic = True


class TestClear8(BackendSuite):
    selection = "clear?weight_bits=8"
    deterministic = True


class TestMlwe(BackendSuite):
    selection = "mlwe"


class TestMlwe16(BackendSuite):
    selection = "mlwe?weight_bits=16"


class TestMlweSmallMessages(BackendSuite):
    selection = "mlwe?request_bits=32&banks=0&ahead=0"


class TestSimulation(BackendSuite):
    selection = "simulation?seed=4"
    deterministic = True


@pytest.mark.slow
class TestZmq(TransportSuite):
    name = "zmq"
    options = "insecure=1"


@pytest.mark.slow
class TestZmqOnAUnixSocket(TransportSuite):
    name = "zmq"
    address = "ipc://{folder}/worker"
    wrong_addresses = ("ipc://", "no such address")


@pytest.mark.slow
class TestZmqCurve(TransportSuite):
    name = "zmq"


class Named(Backend):
    """A copy of ``clear`` that says it encrypts, for faults to be put in."""

    Options = ClearBackend.Options

    @property
    def security(self) -> SecurityStatement:
        return SecurityStatement(True, 128, "claims a lot")

    @property
    def weight_bits(self) -> WeightBits | None:
        return 8

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        half: WorkerHalf = ClearBackend.worker(fields, evaluation_key, device)
        return half

    def client(self, device: torch.device) -> ClientHalf[Any]:
        half: ClientHalf[Any] = ClearBackend().client(device)
        return half


class Plain(Named):
    """Sends activations as they are."""

    name = "plain"


class Thin(Named):
    """Hides activations under noise of a third of their size: far too little."""

    name = "thin"

    class Client(ClientHalf[Any]):
        def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Any]:
            return Encrypted({"x": x + 0.3 * torch.randn_like(x)}, len(x))

        def decrypt(self, reply: Buffers, state: Any, linear_map: LinearMap) -> Tensor:
            return reply["y"]

    def client(self, device: torch.device) -> ClientHalf[Any]:
        return self.Client()


class Careless(Thin):
    """Mixes up requests under way, believes every reply, and gives noise for nothing."""

    name = "careless"

    class Client(Thin.Client):
        last: Tensor = torch.zeros(1, 1)

        def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Any]:
            self.last = x
            return Encrypted({"x": x}, None)

        def decrypt(self, reply: Buffers, state: Any, linear_map: LinearMap) -> Tensor:
            return reply["y"] * self.last.abs().sum() + 0.01 if "y" in reply else torch.zeros(3, 24)


class Boaster(Named):
    """Declares a hundredth of the error that it has."""

    name = "boaster"

    def noise(self, linear_map: LinearMap) -> NoiseModel:
        real = MLWEBackend().noise(linear_map)
        return dataclasses.replace(
            real, input_variance=real.input_variance / 1e4, output_variance=real.output_variance / 1e4
        )

    def client(self, device: torch.device) -> ClientHalf[Any]:
        half: ClientHalf[Any] = MLWEBackend().client(device)
        return half

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        half: WorkerHalf = MLWEBackend.worker(fields, evaluation_key, device)
        return half


class Trusting(Named):
    """Says that it checks answers, and believes each."""

    name = "trusting"

    @property
    def checks_answers(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("plugin", "test", "arguments"),
    [
        (Plain, "test_a_request_gives_nothing_away", ()),
        (Thin, "test_a_request_gives_nothing_away", ()),
        (Thin, "test_products_have_the_declared_error", ("forward",)),
        (Careless, "test_requests_under_way_do_not_mix", ()),
        (Careless, "test_replies_that_are_none", ("missing",)),
        (Careless, "test_tokens_of_zeros", ()),
        (Thin, "test_lookups_are_rows_of_the_table", ()),
        (Trusting, "test_wrong_lookups_are_found", ()),
        (Boaster, "test_lookups_are_rows_of_the_table", ()),
        (Boaster, "test_products_have_the_declared_error", ("backward",)),
        (Boaster, "test_scales_of_inputs", (1.0,)),
    ],
)
def test_faulty_backends_do_not_pass(
    register: Callable[[str, Any], None], plugin: Any, test: str, arguments: tuple[Any, ...]
) -> None:
    register(registry.BACKENDS, plugin)
    suite = type("Suite", (BackendSuite,), {"selection": plugin.name})()
    method = getattr(suite, test)
    pair = [lambda n, k: Pair.make(plugin.name, n, k)] if "pair" in inspect.signature(method).parameters else []
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        method(*pair, *arguments)


class Faulty(Link):
    """A link to nowhere in particular, whose fault is its name."""

    def __init__(self, fault: str, handler: EchoHandler) -> None:
        self.fault = fault
        self.handler = handler

    def submit(self, request: Message) -> Future[Message]:
        future: Future[Message] = Future()
        if self.fault == "drops types":
            future.set_result(Message(request.kind, request.fields, {k: t.float() for k, t in request.buffers.items()}))
        self.handler.kept.append(([], lambda frames, release: None))
        return future

    def close(self) -> None:
        """Leaves whoever waits."""


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("drops types", "test_messages_arrive_as_they_were"),
        ("never answers", "test_messages_without_anything"),
        ("never answers", "test_a_link_that_is_closed"),
    ],
)
def test_faulty_links_do_not_pass(fault: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciphertune.testing.transports._SECONDS", 0.3)
    handler = EchoHandler()
    arguments: dict[str, Any] = {"connected": Faulty(fault, handler), "handler": handler}
    method = getattr(TestZmq(), test)
    wanted = inspect.signature(method).parameters
    with pytest.raises((AssertionError, TimeoutError)):
        method(**{name: arguments[name] for name in wanted})


@dataclasses.dataclass(frozen=True)
class BadOptions:
    pass


class BadlyWrapping(WrappingTransport):
    """Around links, with one fault each."""

    name = "bad"
    Options = BadOptions
    fault: str

    def __init__(self, options: Any = None, inner: Transport | None = None) -> None:
        super().__init__(options, inner)
        if self.fault == "remote":
            self.remote = True

    def wrap(self, link: Link) -> Link:
        return BadlyWrapped(link, self.fault)


class BadlyWrapped(Link):
    def __init__(self, link: Link, fault: str) -> None:
        self.link = link
        self.fault = fault
        self.name = link.name
        self.identity = "" if fault == "identity" else link.identity

    def submit(self, request: Message) -> Future[Message]:
        inner = self.link.submit(request)
        if self.fault != "cancelling":
            return inner
        outer: Future[Message] = Future()
        inner.add_done_callback(lambda _: outer.set_result(inner.result()))
        return outer

    def close(self) -> None:
        if self.fault != "closing":
            self.link.close()


@pytest.mark.parametrize(
    ("fault", "test", "arguments"),
    [
        ("remote", "test_what_belongs_to_the_inner_transport", (False,)),
        ("identity", "test_addresses_and_the_embedded_worker_pass_through", ()),
        ("cancelling", "test_a_request_that_is_given_up", ()),
        ("closing", "test_a_link_that_is_closed", ()),
    ],
)
def test_faulty_wrapping_does_not_pass(
    register: Callable[[str, Any], None], fault: str, test: str, arguments: tuple[Any, ...]
) -> None:
    for each in ("", fault):
        register(registry.TRANSPORTS, type("Bad", (BadlyWrapping,), {"fault": each}))
        suite = type("Suite", (WrappingSuite,), {"name": "bad"})()
        if each:
            with pytest.raises(AssertionError):
                getattr(suite, test)(*arguments)
        else:
            getattr(suite, test)(*arguments)
