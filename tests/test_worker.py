"""The worker: every request is answered, whatever it is."""

from typing import Any

import pytest
import torch

from ciphertune.errors import WorkerError
from ciphertune.protocol import Message
from ciphertune.session import Session, choose
from ciphertune.weights import LayerWeight, WeightStore, describe, quantize
from ciphertune.worker import Worker


def store() -> WeightStore:
    torch.manual_seed(0)
    held = WeightStore()
    for name, shape in {"a": (4, 6), "b": (3, 6), "c": (5, 7)}.items():
        held.add(name, quantize(torch.randn(shape), None))
    return held


def opened(worker: Worker, groups: list[list[str]] | None = None) -> str:
    request = Message("open", {"backend": "clear", "groups": groups or [["a"], ["a", "b"]], "public": {}})
    reply = worker.handle(request)
    assert reply.kind == "ok", reply.fields
    session: str = reply.fields["session"]
    return session


def evaluate(session: str, **changes: Any) -> Message:
    fields = {"session": session, "unit": 0, "direction": "forward", **changes}
    return Message("evaluate", fields, {"x": torch.ones(2, 6)})


def test_a_session_from_hello_to_close() -> None:
    weights = store()
    worker = Worker(weights)
    hello = worker.handle(Message("hello")).fields
    assert hello["layers"] == 3
    assert "mlwe" in hello["backends"]
    rows = worker.handle(Message("manifest")).fields["layers"]
    assert rows[2] == {"name": "c", "shape": [5, 7], "dtype": "float32"}
    session = opened(worker)
    a, b = weights["a"].codes, weights["b"].codes
    torch.testing.assert_close(worker.handle(evaluate(session)).buffers["y"], torch.ones(2, 6) @ a.t())
    both = worker.handle(evaluate(session, unit=1)).buffers["y"]
    torch.testing.assert_close(both, torch.ones(2, 6) @ torch.cat([a, b]).t())
    stats = worker.handle(Message("stats")).fields
    assert (stats["sessions"], stats["errors"]) == (1, 0)
    assert stats["requests"] == 5
    assert stats["bytes_in"] == 2 * 48
    assert worker.handle(Message("close", {"session": session})).kind == "ok"
    assert worker.handle(evaluate(session)).fields["code"] == "unknown-session"
    assert worker.handle(Message("stats")).fields["sessions"] == 0


def test_stacked_layers_are_held_once() -> None:
    weights = store()
    before = {name: weights[name].codes.clone() for name in ("a", "b")}
    stacked = weights.stack(("a", "b"))
    assert weights.stack(("a", "b")) is stacked
    for name, codes in before.items():
        assert torch.equal(weights[name].codes, codes)
        assert weights[name].codes.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Message("ok"), "protocol"),
        (Message("nonsense"), "protocol"),
        (Message("open"), "protocol"),
        (Message("open", {"backend": "mlew", "groups": [["a"]], "public": {}}), "protocol"),
        (Message("open", {"backend": "clear", "groups": [["z"]], "public": {}}), "unknown-layer"),
        (Message("open", {"backend": "clear", "groups": [["a", "c"]], "public": {}}), "protocol"),
        (Message("open", {"backend": "clear", "groups": [["a", "a"]], "public": {}}), "protocol"),
        (Message("open", {"backend": "clear", "groups": [[]], "public": {}}), "protocol"),
        (Message("open", {"backend": "clear", "groups": ["a"], "public": {}}), "protocol"),
        (Message("open", {"backend": "mlwe", "groups": [["a"]], "public": {}}), "protocol"),
        (Message("open", {"backend": "simulation", "groups": [["a"]], "public": {"seed": "x"}}), "protocol"),
        (Message("close", {"session": "none"}), "unknown-session"),
        (Message("close", {"session": 7}), "protocol"),
        (evaluate("none"), "unknown-session"),
    ],
)
def test_wrong_requests_get_error_replies(request_: Message, code: str) -> None:
    worker = Worker(store())
    reply = worker.handle(request_)
    assert (reply.kind, reply.fields["code"]) == ("error", code)
    assert worker.stats.errors == 1
    assert worker.handle(Message("stats")).fields["sessions"] == 0


@pytest.mark.parametrize(
    "changes", [{"unit": 2}, {"unit": -1}, {"unit": True}, {"unit": "0"}, {"direction": "sideways"}, {"direction": 1}]
)
def test_wrong_evaluations(changes: dict[str, Any]) -> None:
    worker = Worker(store())
    assert worker.handle(evaluate(opened(worker), **changes)).fields["code"] == "protocol"


@pytest.mark.parametrize(
    "buffers", [{}, {"x": torch.ones(2, 5)}, {"x": torch.ones(2, 6).double()}, {"x": torch.ones(6)}]
)
def test_wrong_buffers(buffers: dict[str, torch.Tensor]) -> None:
    worker = Worker(store())
    request = Message("evaluate", {"session": opened(worker), "unit": 0, "direction": "forward"}, buffers)
    assert worker.handle(request).fields["code"] == "protocol"


@pytest.mark.parametrize(
    "buffers",
    [
        {"b": torch.zeros(6, 4, 3, dtype=torch.int8)},
        {"seed": torch.zeros(31, dtype=torch.uint8), "b": torch.zeros(6, 4, 3, dtype=torch.int8)},
        {"seed": torch.zeros(32, dtype=torch.uint8), "b": torch.zeros(6, 3, 3, dtype=torch.int8)},
        {"seed": torch.zeros(32, dtype=torch.uint8), "b": torch.zeros(5, 4, 3, dtype=torch.int8)},
        {"seed": torch.zeros(32, dtype=torch.uint8), "b": torch.zeros(6, 4, 0, dtype=torch.int8)},
        {"seed": torch.zeros(32, dtype=torch.uint8), "b": torch.zeros(6, 4, 3, dtype=torch.int16)},
    ],
)
def test_wrong_ciphertexts(buffers: dict[str, torch.Tensor]) -> None:
    worker = Worker(WeightStore({"a": quantize(torch.randn(4, 6), 8)}))
    public = {"parameters": "mlwe-1280", "request_bits": 32, "reply_bits": 24}
    session = worker.handle(Message("open", {"backend": "mlwe", "groups": [["a"]], "public": public})).fields["session"]
    request = Message("evaluate", {"session": session, "unit": 0, "direction": "forward"}, buffers)
    assert worker.handle(request).fields["code"] == "protocol"


def test_unforeseen_errors_do_not_quote_data(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(store())
    session = opened(worker)

    def fail(*_: Any) -> Any:
        raise RuntimeError("activation 3.14159")

    monkeypatch.setattr("ciphertune_clear.ClearWorker.evaluate", fail)
    reply = worker.handle(evaluate(session))
    assert reply.fields["code"] == "internal"
    assert "3.14159" not in str(reply.fields)
    assert "RuntimeError" in reply.fields["message"]


def test_a_workers_refusal_reaches_the_client() -> None:
    held = quantize(torch.randn(4, 6), 8)
    info = describe("elsewhere", held)
    with pytest.raises(WorkerError, match="no layer named 'elsewhere'") as caught:
        Session(choose("mlwe"), [info], [(0,)], Worker(WeightStore({"here": held})), torch.device("cpu"))
    assert caught.value.code == "unknown-layer"


def test_digests_tell_weights_apart() -> None:
    one = quantize(torch.randn(4, 6), 8)
    assert describe("x", one).digest == describe("y", one).digest
    changed = LayerWeight(one.codes.clone(), one.scale)
    changed.codes[0, 0] ^= 1
    assert describe("x", changed).digest != describe("x", one).digest
    assert one.scale is not None
    assert describe("x", LayerWeight(one.codes, one.scale * 2)).digest != describe("x", one).digest
