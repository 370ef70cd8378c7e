"""The worker answers every message, and errors are replies that say which kind they are and nothing they should not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import ciphertune
from ciphertune.backend import LinearMap
from ciphertune.client.choice import choose
from ciphertune.client.session import Session
from ciphertune.errors import PluginError, ProtocolError, UnknownLayerError, WorkerError
from ciphertune.plugins import registry
from ciphertune.protocol import ERROR_CODES, KINDS, Message, error_message, pack, unpack
from ciphertune.weights import DIGEST_ROWS, LayerWeight, describe, group_map, quantize, read_manifest
from ciphertune.worker import SessionLimits, WeightStore, Worker


def weights() -> dict[str, LayerWeight]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (4, 6), "k": (2, 6), "out": (6, 4)}
    return {name: quantize(torch.randn(*shape, generator=generator), None) for name, shape in shapes.items()}


def stored() -> WeightStore:
    """q and k one below the other, out alone."""
    held, store = weights(), WeightStore()
    store.add(
        [describe(name, held[name]).shard() for name in ("q", "k")], torch.cat([held["q"].codes, held["k"].codes])
    )
    store.add([describe("out", held["out"]).shard()], held["out"].codes)
    return store


def ask(worker: Worker, kind: str, fields: Any = None, **buffers: torch.Tensor) -> Message:
    """One request, both ways through its wire form as a remote worker's would be."""
    return unpack(pack(worker.handle(unpack(pack(Message(kind, fields or {}, buffers))))))


def opening(**changes: Any) -> dict[str, Any]:
    return {"backend": "clear", "public": {}, "groups": [["q", "k"], ["q"], ["out"]], **changes}


@pytest.fixture
def worker() -> Worker:
    return Worker(stored())


@pytest.fixture
def session(worker: Worker) -> str:
    return ask(worker, "open", opening()).fields["session"]


def test_hello_and_manifest(worker: Worker) -> None:
    hello = ask(worker, "hello")
    assert hello.kind == "ok"
    assert hello.fields["versions"] == [1, 1]
    assert {"clear", "mlwe"} <= set(hello.fields["backends"])
    assert (hello.fields["device"], hello.fields["layers"]) == ("cpu", 3)
    blocks = read_manifest(ask(worker, "manifest").fields["blocks"])
    held = [[describe(name, weights()[name]).shard() for name in block] for block in (("q", "k"), ("out",))]
    assert blocks == held
    other = Worker(WeightStore.of(weights()))
    assert other.handle(Message("hello")).fields["holdings"] != hello.fields["holdings"], "other blocks"


def test_products_of_groups_and_single_layers(worker: Worker, session: str) -> None:
    w, x = {name: weight.codes for name, weight in weights().items()}, torch.randn(3, 6)
    both = torch.cat([w["q"], w["k"]])
    for group, matrix in [(0, both), (1, w["q"]), (2, w["out"])]:
        features = matrix.shape[1]
        given_x = x[:, :features].contiguous()
        reply = ask(worker, "evaluate", {"session": session, "group": group, "direction": "forward"}, x=given_x)
        torch.testing.assert_close(reply.buffers["y"], given_x @ matrix.t())
        g = torch.randn(2, len(matrix))
        reply = ask(worker, "evaluate", {"session": session, "group": group, "direction": "backward"}, x=g)
        torch.testing.assert_close(reply.buffers["y"], g @ matrix)
        assert reply.fields["seconds"] >= 0


def test_sessions_are_independent_and_close(worker: Worker, session: str) -> None:
    other = ask(worker, "open", opening(groups=[["out"]])).fields["session"]
    assert other != session
    assert len(session) >= 32  # too long to guess
    assert worker.sessions == 2
    assert ask(worker, "close", {"session": other}).kind == "ok"
    request = {"session": other, "group": 0, "direction": "forward"}
    assert ask(worker, "evaluate", request, x=torch.randn(1, 4)).fields["code"] == "unknown-session"
    assert ask(worker, "close", {"session": other}).fields["code"] == "unknown-session"
    assert worker.sessions == 1
    request = {"session": session, "group": 2, "direction": "forward"}
    assert ask(worker, "evaluate", request, x=torch.randn(1, 4)).kind == "ok"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        *[(opening(backend=name), "protocol") for name in ("cler", "", None, 1, ["clear"])],
        *[(opening(public=public), "protocol") for public in (None, [], "x", 1)],
        *[
            (opening(groups=groups), "protocol")
            for groups in (None, {}, "q", [[]], ["q"], [[1]], [["q"], None], [[["q"]]])
        ],
        (opening(groups=[["q"], ["nothing"]]), "unknown-layer"),
        (opening(groups=[["q", "nothing"]]), "unknown-layer"),
        (opening(groups=[["q", "q"]]), "protocol"),
        (opening(groups=[["q", "out"]]), "protocol"),
        ({}, "protocol"),
    ],
)
def test_openings_that_cannot_be_served(worker: Worker, fields: dict[str, Any], code: str) -> None:
    reply = ask(worker, "open", fields)
    assert (reply.kind, reply.fields["code"]) == ("error", code), reply.fields
    assert worker.sessions == 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        *[({"session": value}, "protocol") for value in (None, 7, ["a"], b"a")],
        *[({"session": value}, "unknown-session") for value in ("", "nonsense", "0" * 32)],
        *[({"group": value}, "protocol") for value in (-1, -3, 3, 2**40, True, "0", None, 0.0)],
        *[({"direction": value}, "protocol") for value in ("sideways", "", None, 1, ["forward"])],
    ],
)
def test_evaluations_that_cannot_be_served(worker: Worker, session: str, changes: dict[str, Any], code: str) -> None:
    good = {"session": session, "group": 0, "direction": "forward"}
    x = torch.randn(2, 6)
    reply = ask(worker, "evaluate", {**good, **changes}, x=x)
    assert (reply.kind, reply.fields["code"]) == ("error", code), reply.fields
    assert reply.buffers == {}
    assert ask(worker, "evaluate", good, x=x).kind == "ok"


@pytest.mark.parametrize(
    "buffers",
    [
        {},
        {"y": torch.zeros(2, 6)},
        {"x": torch.zeros(2, 5)},
        {"x": torch.zeros(6)},
        {"x": torch.zeros(1, 2, 6)},
        {"x": torch.zeros(2, 6, dtype=torch.float64)},
        {"x": torch.zeros(2, 6, dtype=torch.int8)},
    ],
)
def test_buffers_that_do_not_fit(worker: Worker, session: str, buffers: dict[str, torch.Tensor]) -> None:
    reply = ask(worker, "evaluate", {"session": session, "group": 0, "direction": "forward"}, **buffers)
    assert reply.fields["code"] == "protocol"
    assert "(tokens, 6)" in reply.fields["message"]


def ciphertext(**changes: Any) -> dict[str, torch.Tensor]:
    good = {"b": torch.zeros(6, 4, 3, dtype=torch.uint8)}
    return {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("buffers", "code"),
    [
        (ciphertext(), None),
        ({}, "protocol"),
        (ciphertext(b=None), "protocol"),
        (ciphertext(b=torch.zeros(6, 3, 3, dtype=torch.uint8)), None),
        (ciphertext(b=torch.zeros(6, 2, 3, dtype=torch.uint8)), "protocol"),
        (ciphertext(b=torch.zeros(6, 5, 3, dtype=torch.uint8)), "protocol"),
        (ciphertext(b=torch.zeros(5, 4, 3, dtype=torch.uint8)), "protocol"),
        (ciphertext(b=torch.zeros(6, 4, 0, dtype=torch.uint8)), "protocol"),
        (ciphertext(b=torch.zeros(6, 4, 3, dtype=torch.int8)), "protocol"),
        (ciphertext(b=torch.zeros(6, 12, dtype=torch.uint8)), "protocol"),
    ],
)
def test_ciphertexts_that_do_not_fit(buffers: dict[str, torch.Tensor], code: str | None) -> None:
    worker = Worker(WeightStore.of({"a": quantize(torch.randn(4, 6), 8)}))
    session = ask(worker, "open", {"backend": "mlwe", "groups": [["a"]], "public": {}}).fields["session"]
    reply = ask(worker, "evaluate", {"session": session, "group": 0, "direction": "forward"}, **buffers)
    assert reply.fields.get("code") == code


@pytest.mark.parametrize("kind", ["ok", "error", "stats", "shutdown", ""])
def test_kinds_that_are_not_requests(worker: Worker, kind: str) -> None:
    reply = worker.handle(Message(kind))
    assert (reply.kind, reply.fields["code"]) == ("error", "protocol")


PLAIN = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2)


@given(
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from(["session", "group", "direction", "backend", "public", "groups", "layer", "start", "stop"]),
        PLAIN | st.just({}),
    ),
)
def test_every_message_is_answered(kind: str, fields: dict[str, Any]) -> None:
    reply = Worker(stored()).handle(Message(kind, fields))
    assert reply.kind in ("ok", "error")
    if reply.kind == "error":
        assert reply.fields["code"] in ERROR_CODES
        assert reply.fields["code"] != "internal", reply.fields


@dataclasses.dataclass(frozen=True)
class NoOptions:
    pass


@pytest.mark.parametrize("place", ["worker", "prepare", "evaluate"])
def test_unforeseen_errors_do_not_leak_their_text(worker: Worker, register: Any, place: str) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("activation 3.14159")

    clear = registry.load(registry.BACKENDS, "clear")

    class Failing(clear):
        name = "failing"

        @classmethod
        def worker(cls, fields: Any, evaluation_key: Any, device: Any) -> Any:
            if place == "worker":
                fail()
            half = clear.worker(fields, evaluation_key, device)
            setattr(half, place, fail)
            return half

    register(registry.BACKENDS, Failing)
    reply = ask(worker, "open", opening(backend="failing"))
    if place == "evaluate":
        request = {"session": reply.fields["session"], "group": 0, "direction": "forward"}
        reply = ask(worker, "evaluate", request, x=torch.randn(2, 6))
    assert reply.fields["code"] == "internal"
    assert "KeyError" in reply.fields["message"]
    assert "backend 'failing' (test:Failing, from test 1.0) failed at this worker" in reply.fields["message"]
    assert "3.14159" not in reply.fields["message"]
    assert ask(worker, "open", opening()).kind == "ok", "the worker goes on"


def test_a_plugin_that_cannot_be_imported_at_the_worker(
    worker: Worker, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = registry.load(registry.BACKENDS, "clear")
    register(registry.BACKENDS, type("Absent", (clear,), {"name": "absent"}))

    def fail() -> None:
        raise PluginError("not here")

    monkeypatch.setattr(registry.installed(registry.BACKENDS)["absent"].entry_point, "load", fail)
    assert ask(worker, "open", opening(backend="absent")).fields["code"] == "plugin"


def test_error_replies_become_worker_errors() -> None:
    net = ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "clear")
    session = ciphertune.session_of(net)
    session.worker.handle = lambda request, peer="": error_message("quota", "enough for today")  # type: ignore
    with pytest.raises(WorkerError, match=r"embedded worker refused .* 'evaluate': enough for today") as caught:
        net(torch.randn(1, 4))
    assert caught.value.code == "quota"


def test_a_session_that_the_worker_forgot_is_opened_again() -> None:
    net = ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "clear")
    session, x = ciphertune.session_of(net), torch.randn(1, 4)
    expected = net(x)
    (known,) = session.pool.workers
    assert session.worker.handle(Message("close", {"session": known.session})).kind == "ok"
    assert torch.equal(net(x), expected)
    assert (session.traffic.requests, session.traffic.retries) == (2, 1)


def test_a_session_serves_only_the_client_that_opened_it(worker: Worker) -> None:
    opened = worker.handle(Message("open", opening()), "alice").fields["session"]
    request = Message("evaluate", {"session": opened, "group": 0, "direction": "forward"}, {"x": torch.randn(2, 6)})
    assert worker.handle(request, "bob").fields["code"] == "unknown-session"
    assert worker.handle(Message("close", {"session": opened}), "bob").fields["code"] == "unknown-session"
    assert worker.handle(request, "alice").kind == "ok"


def test_sessions_are_limited_and_expire() -> None:
    now = 1000.0
    limits = SessionLimits(sessions=2, all_sessions=3, idle_seconds=600)
    worker = Worker(stored(), limits=limits, clock=lambda: now)
    fields = {"backend": "clear", "groups": [["q"]], "public": {}}
    assert [worker.handle(Message("open", fields), "alice").kind for _ in range(3)] == ["ok", "ok", "error"]
    assert worker.handle(Message("open", fields), "bob").kind == "ok"
    assert worker.handle(Message("open", fields), "carol").fields["code"] == "quota"
    now += 599
    assert worker.expire() == 0
    now += 2
    assert (worker.expire(), worker.sessions) == (3, 0)
    assert worker.handle(Message("open", fields), "carol").kind == "ok"


def test_keys_of_sessions_count_against_a_quota() -> None:
    worker = Worker(stored(), limits=SessionLimits(nbytes=250, all_nbytes=400))
    fields = {"backend": "clear", "groups": [["q"]], "public": {}}
    key = {"key": torch.zeros(100, dtype=torch.uint8)}
    opened = [worker.handle(Message("open", fields, key), "alice") for _ in range(3)]
    assert [reply.kind for reply in opened] == ["ok", "ok", "error"]
    assert opened[2].fields["code"] == "quota"
    assert "keys" in opened[2].fields["message"]
    assert worker.session_bytes == 200
    # Without a key there is room for another, and for another client's keys while there is for all.
    assert worker.handle(Message("open", fields), "alice").kind == "ok"
    assert [worker.handle(Message("open", fields, key), "bob").kind for _ in range(2)] == ["ok", "ok"]
    assert worker.handle(Message("open", fields, key), "carol").fields["code"] == "quota"
    worker.handle(Message("close", {"session": opened[0].fields["session"]}), "alice")
    assert worker.handle(Message("open", fields, key), "carol").kind == "ok"


def test_what_keys_become_at_the_worker_counts_too(register: Any) -> None:
    class Half(type(registry.load(registry.BACKENDS, "clear").worker({}, {}, torch.device("cpu")))):  # type: ignore[misc]
        nbytes = 1000

    class Swelling(registry.load(registry.BACKENDS, "clear")):  # type: ignore[misc]
        name = "swelling"

        @classmethod
        def worker(cls, fields: Any, evaluation_key: Any, device: Any) -> Any:
            return Half()

    register(registry.BACKENDS, Swelling)
    worker = Worker(stored(), limits=SessionLimits(nbytes=1500))
    replies = [ask(worker, "open", opening(backend="swelling")) for _ in range(2)]
    assert [reply.kind for reply in replies] == ["ok", "error"]


def test_a_worker_that_holds_something_else_says_so(worker: Worker) -> None:
    reply = ask(worker, "open", {**opening(), "holdings": "0" * 64})
    assert reply.fields["code"] == "holdings"


def test_sessions_with_equal_parameters_share_what_was_prepared(worker: Worker, register: Any) -> None:
    clear = registry.load(registry.BACKENDS, "clear")
    prepared: list[tuple[int, ...]] = []

    class Counting(clear):
        name = "counting"

        @classmethod
        def worker(cls, fields: Any, evaluation_key: Any, device: Any) -> Any:
            half = clear.worker({}, evaluation_key, device)
            prepare = half.prepare
            half.prepare = lambda matrix: prepared.append(tuple(matrix.shape)) or prepare(matrix)
            return half

    register(registry.BACKENDS, Counting)
    x = torch.randn(2, 6)
    opened = [ask(worker, "open", opening(backend="counting", public=p)) for p in ({}, {}, {"other": 1})]
    assert prepared == [(6, 6), (6, 4)], "each block once, for all sessions and groups"
    for reply in opened:
        request = {"session": reply.fields["session"], "group": 0, "direction": "forward"}
        assert ask(worker, "evaluate", request, x=x).kind == "ok"


def test_a_layer_that_the_worker_does_not_hold() -> None:
    held = quantize(torch.randn(4, 6), 8)
    worker = Worker(WeightStore.of({"here": held}))
    with pytest.raises(UnknownLayerError, match="elsewhere: no worker has it"):
        Session(choose("mlwe"), [describe("elsewhere", held)], [(0,)], worker, torch.device("cpu"))
    reply = worker.handle(Message("open", {"backend": "clear", "groups": [["elsewhere"]], "public": {}}))
    assert reply.fields["code"] == "unknown-layer"


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.mark.parametrize("backend", ["clear", "clear?weight_bits=8", "clear?weight_bits=16", "simulation?seed=3"])
def test_the_wire_form_changes_nothing(backend: str) -> None:
    results = []
    for wire in ("0", "1"):
        net = ciphertune.outsource(network(), f"{backend}{'&' if '?' in backend else '?'}wire={wire}")
        x = torch.linspace(-1, 1, 40).reshape(5, 8).requires_grad_()
        y = net(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, [p.grad for p in net.parameters()]))
        traffic = ciphertune.session_of(net).traffic
        assert traffic.requests == 4
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
    for direct, wired in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(direct, wired)  # type: ignore[arg-type]


def test_mlwe_over_the_wire_form() -> None:
    torch.manual_seed(0)
    reference, x = network(), torch.randn(5, 8)
    net = ciphertune.outsource(network(), "mlwe+local://?wire=1")
    torch.testing.assert_close(net(x), reference(x), rtol=0.05, atol=0.05)


def test_quantization_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-45, 0.0, 0.0]])
    held = quantize(weight, 8)
    assert held.codes.tolist()[:2] == [[64, -127, 32], [0, 0, 0]]  # 0.5 · 127 / 2 = 31.75, 63.5 to even
    assert held.scale is not None
    assert held.scale[:2].tolist() == pytest.approx([2 / 127, 0.0])
    assert held.codes.dtype == torch.int8
    assert bool(torch.isfinite(held.dequantize()).all())
    wide = quantize(weight, 16)
    assert wide.codes.dtype == torch.int16
    assert wide.codes[0, 1] == -32639
    assert quantize(weight.double(), None).codes.dtype == torch.float32


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([8, 16]), st.integers(0, 99))
def test_quantization_error_is_half_a_step(n: int, k: int, bits: Any, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    held = quantize(weight, bits)
    assert held.scale is not None
    error = (held.dequantize() - weight).abs()
    assert bool((error <= held.scale[:, None] * 0.51).all())  # and what float32 rounds away
    info = describe("layer", held)
    codes = held.codes.double()
    assert info.max_row_norm == pytest.approx(codes.norm(dim=1).max().item())
    assert info.max_column_norm == pytest.approx(codes.norm(dim=0).max().item())
    assert (info.out_features, info.in_features, info.weight_bits) == (n, k, bits)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 99))
def test_norm_bounds_of_groups(sizes: list[int], k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    held = [quantize(torch.randn(n, k, generator=generator), 8) for n in sizes]
    infos = [describe(str(i), weight) for i, weight in enumerate(held)]
    stacked = torch.cat([weight.codes for weight in held]).double()
    for direction, matrix in (("forward", stacked), ("backward", stacked.t())):
        linear_map = group_map(infos, direction)  # type: ignore[arg-type]
        assert (linear_map.out_features, linear_map.in_features) == matrix.shape
        # An overestimate costs precision, an underestimate lets outputs wrap.
        assert linear_map.max_norm >= matrix.norm(dim=1).max().item() * (1 - 1e-12)
        assert linear_map.max_norm <= matrix.norm(dim=1).max().item() * len(sizes) ** 0.5 * (1 + 1e-12)
        assert direction in linear_map.label


def test_digests_tell_weights_apart() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    digests = {
        describe("a", quantize(weight * factor, bits)).digest() for factor in (1, 2, -1) for bits in (8, 16, None)
    }
    assert len(digests) == 9
    assert describe("a", quantize(weight, 8)).digest() == describe("b", quantize(weight.clone(), 8)).digest()


def test_digests_of_rows_are_those_of_a_layer_of_these_rows() -> None:
    held = quantize(torch.randn(3 * DIGEST_ROWS + 5, 4), 8)
    assert held.scale is not None
    info = describe("a", held)
    for start, stop in ((0, 64), (64, 192), (128, 197), (192, 197)):
        part = describe("a", LayerWeight(held.codes[start:stop], held.scale[start:stop]))
        assert info.digest(start, stop) == part.digest() != info.digest()


def test_the_store_holds_one_copy() -> None:
    store = stored()
    assert store.nbytes == 4 * (24 + 12 + 24)
    stacked = store.matrix(("q", "k"))
    assert store["k"].untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    for name, weight in weights().items():
        assert torch.equal(store[name], weight.codes)
    assert (list(store), len(store), "q" in store, "z" in store) == (["q", "k", "out"], 3, True, False)
    with pytest.raises(ValueError, match="held already"):
        store.add([describe("q", weights()["q"]).shard()], weights()["q"].codes)
    with pytest.raises(UnknownLayerError):
        store["z"]
    for apart in (("q", "out"), ("k", "q"), ("q", "q")):
        with pytest.raises(ProtocolError, match="do not lie one below the other"):
            store.matrix(apart)


def test_a_block_must_fit_what_is_said_of_it() -> None:
    q, k = (describe(name, weights()[name]).shard() for name in ("q", "k"))
    codes = torch.cat([weights()["q"].codes, weights()["k"].codes])
    for shards, block in (([q], codes), ([q, k], codes[:-1]), ([q, k], codes.to(torch.int8)), ([q, q], codes)):
        with pytest.raises(ValueError, match="announced|held already"):
            WeightStore().add(shards, block)


def test_clear_reports_that_it_protects_nothing() -> None:
    backend = choose("clear").backend
    assert backend.security.encrypted is False
    assert backend.security.bits is None
    assert backend.noise(LinearMap("layer", "forward", 6, 4, 100.0)) is None
