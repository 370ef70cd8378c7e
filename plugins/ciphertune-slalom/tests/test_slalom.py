"""What the conformance suite cannot know: worst cases, pieces, passes, lies to pieces, and the wire."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ciphertune
from ciphertune import SecurityError, SelectionError
from ciphertune.backend import Direction, LinearMap
from ciphertune.errors import NotPreparedError, ProtocolError, ReplyError, TransportTimeoutError, WrongReplyError
from ciphertune.testing import Faults, ServedWorker
from ciphertune_slalom import SlalomBackend, SlalomOptions, pads as pads_module
from ciphertune_slalom.client import SlalomClient
from ciphertune_slalom.worker import SlalomWorker

CPU = torch.device("cpu")
OUTPUTS, FEATURES = 150, 40


def codes(rows: int = OUTPUTS, columns: int = FEATURES) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def maps(weight: Tensor) -> dict[Direction, LinearMap]:
    largest = [float(weight.double().norm(dim=dim).max()) for dim in (1, 0)]
    n, k = weight.shape
    return {
        "forward": LinearMap("layer (forward)", "forward", k, n, largest[0], "f"),
        "backward": LinearMap("layer (backward)", "backward", n, k, largest[1], "b"),
    }


def piece_of(whole: LinearMap, *rows: tuple[int, int]) -> LinearMap:
    count = sum(stop - start for start, stop in rows)
    sizes = {"out_features": count} if whole.direction == "forward" else {"in_features": count}
    return dataclasses.replace(whole, identity="", rows=rows, **sizes)


def prepare(client: SlalomClient, weight: Tensor, pieces: Any = ()) -> bool:
    """As a session does it; whether there was something to prepare."""
    both = maps(weight)
    preparation = client.preparation(both["forward"], both["backward"], pieces)
    if preparation is None:
        return False
    for row in range(0, len(weight), 64):
        preparation.absorb(row, weight[row : row + 64])
    preparation.finish()
    return True


@contextlib.contextmanager
def client_of(weight: Tensor, pieces: Any = (), tokens: int = 64) -> Iterator[SlalomClient]:
    client = SlalomBackend(SlalomOptions(tokens)).client(CPU)
    assert isinstance(client, SlalomClient)
    prepare(client, weight, pieces)
    try:
        yield client
    finally:
        client.close()


def test_the_worst_case_does_not_wrap() -> None:
    """A token parallel to the weight's longest row, with one value and with many.

    Equal values are rounded alike, so that their errors add up to more than the model says, which takes them as
    independent.
    """
    weight = codes(3, 4096)
    weight[0] = 127
    whole = maps(weight)["forward"]
    x = torch.stack([weight[0].float(), -weight[0].float(), torch.eye(4096)[5]])
    with client_of(weight) as client:
        sent = client.encrypt(x, whole)
        y = client.decrypt(SlalomWorker(CPU).evaluate(weight, "forward", sent.buffers), sent.state, whole)
    torch.testing.assert_close(y, (x.double() @ weight.double().t()).float(), rtol=1e-4, atol=1)


def test_the_error_is_the_rounding_of_inputs() -> None:
    weight = codes()
    whole = maps(weight)["forward"]
    x = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(1))
    with client_of(weight) as client:
        sent = client.encrypt(x, whole)
        y = client.decrypt(SlalomWorker(CPU).evaluate(weight, "forward", sent.buffers), sent.state, whole)
    expected = x.double() @ weight.double().t()
    assert float((y - expected).norm() / expected.norm()) < 1e-6


def test_requests_of_the_same_input_have_nothing_in_common() -> None:
    """Sums and differences of two requests are uniform as well: their pads are independent."""
    weight = codes()
    whole = maps(weight)["forward"]
    x = torch.ones(64, FEATURES)
    with client_of(weight, tokens=128) as client:
        first, second = (client.encrypt(x, whole).buffers["b"] for _ in range(2))
    for words in (first, second, first - second):
        raw = words.contiguous().view(torch.uint8).double()
        # 255/2 ± the deviation of a mean of uniform bytes.
        assert abs(float(raw.mean()) - 127.5) < 6 * math.sqrt((256**2 - 1) / 12 / raw.numel())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pieces_of_one_request(direction: Direction, order: tuple[int, ...]) -> None:
    """Workers that hold some rows each, in any order, also rows that do not adjoin; each lie of one is found."""
    weight = codes()
    whole = maps(weight)[direction]
    rows = [((0, 20), (100, 150)), ((20, 64),), ((64, 100),)]
    pieces = [piece_of(whole, *rows[index]) for index in order]
    x = torch.randn(70, whole.in_features, generator=torch.Generator().manual_seed(1))
    with client_of(weight, [piece_of(maps(weight)["forward"], *each) for each in rows], tokens=70) as client:
        sent = client.encrypt_pieces(x, whole, pieces)
        taken = []
        for each, piece in zip(sent, pieces, strict=True):
            held = torch.cat([weight[start:stop] for start, stop in piece.rows])
            worker = SlalomWorker(CPU)
            reply = worker.evaluate(worker.prepare(held), direction, each.buffers)
            assert worker.reply_bytes(held, direction, each.buffers) == reply["y"].nbytes
            client.check_reply(reply, each.state, piece)
            wrong = {"y": reply["y"].clone()}
            wrong["y"][1] += 1 << 30
            with pytest.raises(WrongReplyError):
                client.check_reply(wrong, each.state, piece)
            taken.append(client.take_reply(reply, each.state, piece))
        y = client.put_together(taken, [each.state for each in sent], whole, pieces)
    matrix = weight.double() if direction == "forward" else weight.double().t()
    torch.testing.assert_close(y.double(), x.double() @ matrix.t(), rtol=1e-4, atol=1e-2)


def test_some_rows_alone() -> None:
    """A layer of a group that is evaluated alone is some rows of its product."""
    weight = codes()
    whole = maps(weight)["forward"]
    part = piece_of(whole, (20, 64))
    x = torch.randn(3, FEATURES)
    with client_of(weight, [part]) as client:
        (sent,) = client.encrypt_pieces(x, whole, [part])
        reply = SlalomWorker(CPU).evaluate(weight[20:64], "forward", sent.buffers)
        y = client.put_together([client.take_reply(reply, sent.state, part)], [sent.state], whole, [part])
    torch.testing.assert_close(y, (x.double() @ weight[20:64].double().t()).float(), rtol=1e-4, atol=1e-2)


def test_pieces_that_nothing_was_prepared_for() -> None:
    weight = codes()
    whole = maps(weight)["forward"]
    part = piece_of(whole, (7, 64))
    with client_of(weight) as client:
        with pytest.raises(SecurityError, match="nothing was prepared"):
            client.encrypt_pieces(torch.ones(1, FEATURES), whole, [part])
        assert prepare(client, weight, [part])
        assert not prepare(client, weight, [part])
        client.encrypt_pieces(torch.ones(1, FEATURES), whole, [part])


@pytest.mark.parametrize("error", [1, 1 << 15, 1 << 31])
@pytest.mark.parametrize("rows", [1, 2, OUTPUTS])
def test_lies_are_found(error: int, rows: int) -> None:
    """Of one unit as of half the modulus, in one output of one token or in all: none of 40 passes all 64 vectors."""
    weight = codes()
    whole = maps(weight)["forward"]
    with client_of(weight) as client:
        sent = client.encrypt(torch.randn(16, FEATURES), whole)
        right = SlalomWorker(CPU).evaluate(weight, "forward", sent.buffers)["y"]
        for token in range(16):
            wrong = right.to(torch.int64)
            wrong[token, :rows] += error
            with pytest.raises(WrongReplyError):
                client.check_reply({"y": wrong.to(torch.int32)}, sent.state, whole)
        client.check_reply({"y": right}, sent.state, whole)


def test_passes_make_what_is_missing() -> None:
    weight = codes()
    both = maps(weight)
    worker = SlalomWorker(CPU)
    with client_of(weight, tokens=10) as client:
        assert not prepare(client, weight)
        for tokens in (6, 4, 3, 25):
            x = torch.randn(tokens, FEATURES)
            try:
                sent = client.encrypt(x, both["forward"])
            except NotPreparedError:
                assert prepare(client, weight)
                sent = client.encrypt(x, both["forward"])
            reply = worker.evaluate(weight, "forward", sent.buffers)
            y = client.decrypt(reply, sent.state, both["forward"])
            torch.testing.assert_close(y, (x.double() @ weight.double().t()).float(), rtol=1e-4, atol=1e-2)


def test_a_pass_of_several_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one key's keystream is too short, and for requests over the end of one."""
    monkeypatch.setattr(pads_module, "_MOST_BLOCKS", 30)  # 10 tokens of 40 values
    weight = codes()
    whole = maps(weight)["forward"]
    x = torch.randn(24, FEATURES)
    with client_of(weight, tokens=24) as client:
        sent = client.encrypt(x, whole)
        y = client.decrypt(SlalomWorker(CPU).evaluate(weight, "forward", sent.buffers), sent.state, whole)
    torch.testing.assert_close(y, (x.double() @ weight.double().t()).float(), rtol=1e-4, atol=1e-2)


def test_memory_is_foretold() -> None:
    weight = codes()
    both = maps(weight)
    with client_of(weight, tokens=32) as client:
        products = [batch.products for batches in client._stock._batches.values() for batch, _ in batches]
        held = sum(each.nbytes for each in products if each is not None)
        checks = client._checks["f"]
        held += sum(each.nbytes for each in vars(checks).values() if isinstance(each, Tensor))
    assert SlalomBackend(SlalomOptions(32)).kept_bytes(both["forward"], both["backward"]) == held


def test_products_that_are_too_large_are_refused() -> None:
    backend = SlalomBackend()
    for features, outputs, refused in ((1 << 20, 1 << 20, False), (2, (1 << 20) + 1, True), ((1 << 20) + 1, 2, True)):
        why = backend.refuse(LinearMap("layer", "forward", features, outputs, 1.0))
        assert (why is not None) == refused


@pytest.mark.parametrize("value", ["0", "-1", "1048577", "many"])
def test_options_that_are_none(value: str) -> None:
    with pytest.raises(SelectionError, match="tokens"):
        SlalomBackend.from_text({"tokens": value})


def test_a_worker_takes_no_fields_no_key_and_only_int8_weights() -> None:
    for fields, key in (({"a": 1}, {}), ({}, {"key": torch.zeros(1)})):
        with pytest.raises(ProtocolError, match="without"):
            SlalomBackend.worker(fields, key, CPU)
    with pytest.raises(ProtocolError, match="int8"):
        SlalomWorker(CPU).prepare(torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(), (0,), (FEATURES,), (0, FEATURES), (3, FEATURES + 1), (1, 3, FEATURES)])
def test_requests_of_other_shapes(shape: tuple[int, ...]) -> None:
    worker = SlalomWorker(CPU)
    request = {"b": torch.zeros(shape, dtype=torch.int32)}
    assert worker.reply_bytes(codes(), "forward", request) is not None
    with pytest.raises(ProtocolError, match="expected int32"):
        worker.evaluate(codes(), "forward", request)


def test_replies_of_other_shapes() -> None:
    weight = codes()
    whole = maps(weight)["forward"]
    with client_of(weight) as client:
        sent = client.encrypt(torch.ones(2, FEATURES), whole)
        for bad in (torch.zeros(2, OUTPUTS), torch.zeros(3, OUTPUTS, dtype=torch.int32), torch.zeros(0)):
            with pytest.raises(ReplyError, match="expected int32"):
                client.check_reply({"y": bad}, sent.state, whole)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 3))


X = torch.linspace(-1, 1, 60).reshape(10, 6)


def test_a_session_makes_passes(ciphertune_worker: Callable[..., ServedWorker]) -> None:
    """Codes are read again from the worker as pads are used up, and each product is right."""
    expected = network()(X).detach()
    model = ciphertune.outsource(network(), ciphertune_worker(network()).selection("slalom", tokens=25), "all")
    session = ciphertune.session_of(model)
    weights = 6 * 80 + 80 * 3
    read = []
    for _ in range(6):
        torch.testing.assert_close(model(X).detach(), expected, rtol=0.05, atol=0.05)
        read.append(session.set_up.weights // weights)
    assert read == [1, 1, 2, 2, 3, 3]
    session.close()


def test_pads_are_made_between_products() -> None:
    model = ciphertune.outsource(network(), "slalom?tokens=10", "all")
    session = ciphertune.session_of(model)
    for _ in range(3):
        assert session.prepare() in (0, 6 * 80 + 80 * 3)
        read = session.set_up.weights
        model(X)
        assert session.set_up.weights == read, "the product had to wait for a pass"
    session.close()


def test_a_retry_sends_the_same_bytes(ciphertune_faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is sent again under its pad, in the same bytes; answers that come twice do no harm."""
    sent: list[bytes] = []
    evaluate = SlalomWorker.evaluate

    def spy(self: SlalomWorker, prepared: Tensor, direction: Direction, request: dict[str, Tensor]) -> Any:
        sent.append(request["b"].numpy().tobytes())
        return evaluate(self, prepared, direction, request)

    monkeypatch.setattr(SlalomWorker, "evaluate", spy)
    to = f"slalom+{ciphertune_faults.over()}://?timeout=0.2"
    model = ciphertune.outsource(network(), to, "all")
    ciphertune_faults.duplicate(2)
    model(X)
    assert len(sent) == 4
    assert (sent[0], sent[2]) == (sent[1], sent[3])
    ciphertune_faults.delay(0.3)  # the answer to the first attempt comes while the second is under way
    before = len(sent)
    torch.testing.assert_close(model(X).detach(), network()(X).detach(), rtol=0.05, atol=0.05)
    assert sent[before] == sent[before + 1]
    assert len(set(sent)) == 4
    ciphertune.session_of(model).close()


def test_a_hedge_sends_the_same_bytes_to_a_replica(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(ServedWorker(network(), "zmq", tmp_path, options="insecure=1")) for _ in range(2)
        ]
        addresses = ",".join(each.address for each in workers)
        model = ciphertune.outsource(network(), f"slalom+zmq://{addresses}?insecure=1&hedge=0.001", "all")
        stack.callback(ciphertune.session_of(model).close)
        for _ in range(3):
            torch.testing.assert_close(model(X).detach(), network()(X).detach(), rtol=0.05, atol=0.05)


def test_a_product_that_is_given_up_uses_up_its_pads_alone(ciphertune_faults: Faults) -> None:
    to = f"slalom+{ciphertune_faults.over()}://?timeout=0.1&deadline=0.3"
    model = ciphertune.outsource(network(), to, "all")
    ciphertune_faults.drop(1000)
    with pytest.raises(TransportTimeoutError):
        model(X)
    ciphertune_faults.heal()
    torch.testing.assert_close(model(X).detach(), network()(X).detach(), rtol=0.05, atol=0.05)
    ciphertune.session_of(model).close()


def test_callers_are_kept_apart() -> None:
    from ciphertune.callers import batch_of

    model = ciphertune.outsource(network(), "slalom", "all")
    session = ciphertune.session_of(model)
    session.keep_apart()
    with batch_of(["one", "another"]):
        y = model(X.reshape(2, 5, 6))
    torch.testing.assert_close(y.reshape(10, 3).detach(), network()(X).detach(), rtol=0.05, atol=0.05)
    session.close()
    with pytest.raises(SecurityError, match="closed"), batch_of(["one"]):
        model(X)


def test_the_halves_do_not_import_each_other() -> None:
    """A worker needs no cryptography, and has no pads."""
    script = """
import sys
import torch
from ciphertune_slalom import SlalomBackend
worker = SlalomBackend.worker({}, {}, torch.device("cpu"))
request = {"b": torch.ones(2, 3, dtype=torch.int32)}
assert worker.evaluate(torch.ones(4, 3, dtype=torch.int8), "forward", request)["y"].tolist() == [[3] * 4] * 2
assert not {"ciphertune_slalom.client", "ciphertune_slalom.pads"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=300)
    for name in ("client", "pads", "checks", "arithmetic"):
        source = (Path(pads_module.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert "ciphertune_slalom.worker" not in source


def test_the_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
