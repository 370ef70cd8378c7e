"""What must not be sent is not sent, and what came back wrong is not used: one table over all backends."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from seen import seen_by
from torch import Tensor, nn

import ciphertune
from ciphertune.errors import (
    InputError,
    NothingOutsourcedError,
    ProtocolError,
    ReplyError,
    SelectionError,
    TransportError,
    TransportTimeoutError,
    UnknownLayerError,
    WorkerError,
)
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.transport import Link, LocalWorker, Transport

BACKENDS = ["clear", "simulation", "mlwe"]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(2, 5), "(…, 6), got (2, 5)"),
        (torch.zeros(6, 2), "(…, 6), got (6, 2)"),
        (torch.zeros(()), "(…, 6), got ()"),
        (torch.zeros(2, 0), "(…, 6), got (2, 0)"),
        (torch.zeros(2, 6, dtype=torch.int64), "torch.int64"),
        (torch.zeros(2, 6, dtype=torch.bool), "torch.bool"),
        (torch.zeros(2, 6, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_inputs_of_the_wrong_kind(backend: str, recorder: Any, x: Tensor, text: str) -> None:
    model = ciphertune.outsource(network(), backend, plugins=recorder.plugins)
    seen = seen_by(ciphertune.session_of(model).worker)
    with pytest.raises(InputError) as caught:
        model(x)
    assert "up" in str(caught.value)
    assert text in str(caught.value)
    assert (seen, recorder.asked) == ([], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_are_not_finite(backend: str, recorder: Any, value: float, dtype: torch.dtype) -> None:
    """Padding may hold what nothing reads: other rows are right, and what reads these gets NaN, as in the clear."""
    plain = network().to(dtype)
    model = ciphertune.outsource(copy.deepcopy(plain), backend, plugins=recorder.plugins)
    x = torch.linspace(-1, 1, 36, dtype=dtype).reshape(2, 3, 6)
    wanted = plain(x)
    x[1, 2, 3] = value
    x.requires_grad_()
    y = model(x)
    assert bool(y[1, 2].isnan().all())
    rest = torch.ones(2, 3, dtype=torch.bool)
    rest[1, 2] = False
    torch.testing.assert_close(y[rest], wanted[rest], rtol=0.05, atol=0.05)
    y[rest].sum().backward()
    assert x.grad is not None
    assert bool(x.grad[rest].isfinite().all())
    assert {exchange.tokens for exchange in recorder.answered} == {6}
    with pytest.raises(InputError, match="nothing was sent"):
        model(x).square().sum().backward()


def test_values_beyond_float32_are_infinite(backend: str) -> None:
    model = ciphertune.outsource(network(), backend)
    with pytest.raises(InputError, match="infinite"):
        model(torch.full((1, 6), 1e300, dtype=torch.float64))


def test_large_values_whose_sum_overflows_are_finite(backend: str) -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Linear(6, 4, bias=False)), backend)
    x = torch.full((1000, 6), 1e35)
    assert bool(torch.isinf(x.sum()))
    torch.testing.assert_close(model(x) / 1e35, model(x / 1e35), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(backend: str, recorder: Any, value: float) -> None:
    model = ciphertune.outsource(network(), backend, plugins=recorder.plugins)
    x = torch.randn(2, 6, requires_grad=True)
    y = model(x)
    seen = seen_by(ciphertune.session_of(model).worker)
    gradient = torch.ones_like(y)
    gradient[0, 1] = value
    with pytest.raises(InputError, match=r"down \(backward\): 1 of 8 values are NaN or infinite; nothing was sent"):
        y.backward(gradient)
    assert not seen
    assert recorder.products("backward") == []
    assert x.grad is None
    # The session is as good as before.
    model(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())  # type: ignore[arg-type]


def test_errors_show_no_values(backend: str) -> None:
    model = ciphertune.outsource(network(), backend)
    y = model(torch.ones(1, 6, requires_grad=True))
    gradient = torch.full((1, 4), 0.123456)
    gradient[0, 0] = float("nan")
    with pytest.raises(InputError) as caught:
        y.backward(gradient)
    assert "0.123" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "layers", "options", "error"),
    [
        (Net, "sideways", "", UnknownLayerError),
        (Net, ["up", "x*"], "", UnknownLayerError),
        (Net, [], "", NothingOutsourcedError),
        (nn.ReLU, None, "", NothingOutsourcedError),
        (nn.Sequential, "all", "", NothingOutsourcedError),
        (Net, None, "?no_such_option=1", SelectionError),
        (Net, None, "?weight_bits=7", SelectionError),
        (Net, None, "?weight_bits=", SelectionError),
        (Net, None, "?share_inputs=maybe", SelectionError),
        (Net, None, "?weight_bits=8&weight_bits=8", SelectionError),
        (Net, None, "+no_such_transport://", SelectionError),
        (Net, None, "+local://somewhere", SelectionError),
        (Net, None, "+local", SelectionError),
        (Net, None, "x", SelectionError),
    ],
)
def test_calls_that_cannot_work(backend: str, module: Any, layers: Any, options: str, error: type[Exception]) -> None:
    model = module()
    before = dict(model.named_modules())
    with pytest.raises(error):
        ciphertune.outsource(model, backend + options, layers=layers)
    assert dict(model.named_modules()) == before


@dataclasses.dataclass(frozen=True)
class NoOptions:
    pass


class TamperingLink(Link):
    def __init__(self, inner: Link) -> None:
        self.inner = inner

    def submit(self, request: Message) -> Future[Message]:
        if request.kind != "evaluate":
            return self.inner.submit(request)
        future: Future[Message] = Future()
        try:
            future.set_result(Tampering.change(self.inner.submit(request).result()))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        self.inner.close()


class Tampering(Transport):
    """The local transport, with replies to products changed on the way."""

    name = "tampering"
    Options = NoOptions
    remote = False
    change: Callable[[Message], Message] = staticmethod(lambda reply: reply)

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[Link]:
        (inner,) = registry.load(registry.TRANSPORTS, "local")().connect(endpoints, worker)
        return [TamperingLink(inner)]


def each_buffer(change: Callable[[Tensor], Tensor | None]) -> Callable[[Message, str], Message]:
    """A change of one buffer of a reply; None drops it."""

    def apply(reply: Message, name: str) -> Message:
        buffers = dict(reply.buffers)
        changed = change(buffers.pop(name))
        if changed is not None:
            buffers[name] = changed
        return Message(reply.kind, reply.fields, buffers)

    return apply


BUFFER_CHANGES = {
    "dropped": lambda t: None,
    "without its last row": lambda t: t[:-1],
    "without its last column": lambda t: t[..., :-1],
    "without any row": lambda t: t[:0],
    "one row longer": lambda t: torch.cat([t, t[:1]]),
    "flattened": lambda t: t.reshape(-1),
    "with a dimension more": lambda t: t[None],
    "a scalar": lambda t: t.reshape(-1)[0],
    "of another dtype": lambda t: t.to(torch.float64),
    "of another integer dtype": lambda t: t.to(torch.int16),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("change", BUFFER_CHANGES)
def test_replies_with_a_changed_buffer(
    backend: str, register: Any, recorder: Any, monkeypatch: pytest.MonkeyPatch, change: str, direction: str
) -> None:
    register(registry.TRANSPORTS, Tampering)
    model = ciphertune.outsource(network(), f"{backend}+tampering://", plugins=recorder.plugins)
    apply = each_buffer(BUFFER_CHANGES[change])
    layer = {"forward": "up", "backward": "down"}[direction]
    names: list[str] = []

    def observe(reply: Message) -> Message:
        names[:] = reply.buffers
        return reply

    x = torch.randn(3, 6, requires_grad=True)
    monkeypatch.setattr(Tampering, "change", staticmethod(observe))
    expected = model(x)
    assert names
    for name in list(names):
        y = model(x)
        counted = len(recorder.answered)
        with monkeypatch.context() as patch:
            patch.setattr(Tampering, "change", staticmethod(lambda reply, name=name: apply(reply, name)))
            with pytest.raises(ReplyError, match=rf"{layer} \({direction}\)"):
                model(x) if direction == "forward" else y.sum().backward()
        assert len(recorder.answered) == counted
        assert x.grad is None
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Message("hello"), ReplyError),
        (Message("evaluate"), ReplyError),
        (Message("ok"), ReplyError),
        (Message("error"), WorkerError),
        (Message("error", {"code": "quota", "message": "enough for today"}), WorkerError),
        (Message("error", {"code": ["quota"], "message": None}), WorkerError),
        (Message("ok", {"seconds": "soon"}), ReplyError),
    ],
)
def test_replies_of_another_kind(
    backend: str, register: Any, monkeypatch: pytest.MonkeyPatch, reply: Message, error: type[Exception]
) -> None:
    register(registry.TRANSPORTS, Tampering)
    model = ciphertune.outsource(network(), f"{backend}+tampering://")
    monkeypatch.setattr(Tampering, "change", staticmethod(lambda _: reply))
    with pytest.raises(error) as caught:
        model(torch.randn(2, 6))
    if isinstance(caught.value, WorkerError):
        assert caught.value.code == str(reply.fields.get("code"))
        assert str(reply.fields.get("message")) in str(caught.value)
    assert ciphertune.session_of(model).traffic.requests == 0


def test_a_good_reply_of_another_kind(backend: str, register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(registry.TRANSPORTS, Tampering)
    model = ciphertune.outsource(network(), f"{backend}+tampering://")
    monkeypatch.setattr(Tampering, "change", staticmethod(lambda reply: Message("stats", reply.fields, reply.buffers)))
    with pytest.raises(ReplyError, match="answered a 'evaluate' request with 'stats'"):
        model(torch.randn(2, 6))


@pytest.mark.parametrize("cut", [lambda y: y[:-1], lambda y: y[:, :-1], lambda y: y[None], lambda y: y.t()])
def test_a_backend_that_decrypts_to_another_shape(backend: str, monkeypatch: pytest.MonkeyPatch, cut: Any) -> None:
    cls = registry.load(registry.BACKENDS, backend)
    make = cls.client

    def client(self: Any, device: torch.device) -> Any:
        half = make(self, device)
        put_together = half.put_together
        half.put_together = lambda *arguments: cut(put_together(*arguments))
        return half

    monkeypatch.setattr(cls, "client", client)
    model = ciphertune.outsource(network(), backend)
    with pytest.raises(ReplyError, match=r"up \(forward\): the reply decrypts to the wrong shape"):
        model(torch.randn(2, 6))


@pytest.mark.parametrize("error", [TransportError, TransportTimeoutError, ProtocolError])
def test_links_that_fail(backend: str, register: Any, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    register(registry.TRANSPORTS, Tampering)
    model = ciphertune.outsource(network(), f"{backend}+tampering://?deadline=0.2")

    def fail(reply: Message) -> Message:
        raise error("the cable is cut")

    x = torch.randn(2, 6)
    expected = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(Tampering, "change", staticmethod(fail))
        # What may pass is tried again until the deadline.
        with pytest.raises(ProtocolError if error is ProtocolError else TransportTimeoutError, match="cable"):
            model(x)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


def test_seconds_that_are_no_number_are_not_counted(
    backend: str, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry.TRANSPORTS, Tampering)
    model = ciphertune.outsource(network(), f"{backend}+tampering://")

    def change(reply: Message) -> Message:
        return Message("ok", {"seconds": "soon"}, reply.buffers)

    monkeypatch.setattr(Tampering, "change", staticmethod(change))
    model(torch.randn(2, 6))
    assert ciphertune.session_of(model).traffic.evaluate_seconds == 0


def test_a_closed_link(backend: str) -> None:
    model = ciphertune.outsource(network(), f"{backend}?deadline=0.2")
    session = ciphertune.session_of(model)
    for worker in session.pool.workers:
        worker.link.close()
        worker.link.close()
    with pytest.raises(TransportTimeoutError, match="closed"):
        model(torch.randn(2, 6))
    session.close()
    assert session.closed
