"""The selection string, its options, and what ``choose`` makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, strategies as st
from seen import seen_by
from torch import nn

import ciphertune
from ciphertune._support.options import build_options, split_options
from ciphertune._support.suggestions import closest
from ciphertune.client.choice import choose
from ciphertune.errors import OutsourcedWeightError, PluginError, SecurityError, SelectionError, TransportError
from ciphertune.plugins import registry
from ciphertune.selection import Selection
from ciphertune.transport import Link, LocalWorker, Transport, WrappingTransport
from ciphertune.weights import quantize
from ciphertune.worker import WeightStore, Worker

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,5}(-[a-z0-9]{1,4})?", fullmatch=True)
ENDPOINTS = st.from_regex(r"[A-Za-z0-9.:\[\]_/-]{1,20}", fullmatch=True)


@given(NAMES, NAMES, st.lists(ENDPOINTS, max_size=3), st.dictionaries(NAMES, st.text(max_size=8), max_size=3))
def test_text_round_trip(backend: str, transport: str, endpoints: list[str], options: dict[str, str]) -> None:
    selection = Selection(backend, transport, tuple(endpoints), options)
    assert Selection.parse(str(selection)) == selection


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "MLWE",
        "://x",
        "+zmq://x",
        "mlwe+://x",
        "mlwe+zmq",
        "mlwe+zmq://a,,b",
        "mlwe?a",
        "mlwe?a=1&a=2",
        "mlwe?=&",
        "ml we",
        "mlwe:/x",
        "mlwe+a+b://x",
    ],
)
def test_malformed_text(text: str) -> None:
    with pytest.raises(SelectionError):
        Selection.parse(text)


@given(st.text(max_size=30))
def test_any_text_parses_or_is_a_selection_error(text: str) -> None:
    try:
        selection = Selection.parse(text)
    except SelectionError:
        return
    assert selection.backend


def test_not_text() -> None:
    with pytest.raises(SelectionError):
        Selection.parse(None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Options:
    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    bits: Literal[8, 16] = 8
    kind: Literal["a", "b"] | None = None
    path: str | None = None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("flag", "1", True),
        ("flag", "TRUE", True),
        ("flag", "off", False),
        ("flag", "0", False),
        ("count", "-3", -3),
        ("ratio", "1e-3", 1e-3),
        ("bits", "16", 16),
        ("kind", "b", "b"),
        ("kind", "none", None),
        ("path", "/a b", "/a b"),
        ("path", None, None),
    ],
)
def test_option_values(name: str, text: Any, value: Any) -> None:
    result = getattr(build_options(Options, {name: text}), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("name", "text"), [("flag", "2"), ("flag", ""), ("count", "1.5"), ("ratio", "x"), ("bits", "32"), ("kind", "c")]
)
def test_option_values_of_the_wrong_form(name: str, text: str) -> None:
    with pytest.raises(SelectionError, match=name):
        build_options(Options, {name: text})


def test_unknown_names_list_the_known_and_the_closest() -> None:
    with pytest.raises(SelectionError, match=r"unknown backend 'mlew'; did you mean 'mlwe'\? Known: .*clear.*mlwe"):
        choose("mlew")
    with pytest.raises(SelectionError, match=r"unknown transport 'locl'; did you mean 'local'\? Known: .*local"):
        choose("clear+locl://")
    with pytest.raises(
        SelectionError, match=r"unknown option 'weight_bit'; did you mean 'weight_bits'\? Known: .*wire"
    ):
        choose("clear?weight_bit=8")
    with pytest.raises(SelectionError, match=r"unknown option 'cuont'; did you mean 'count'\?"):
        build_options(Options, {"cuont": "1"})
    assert closest("zzz", []) == "Known: none"


def test_options_go_to_the_first_owner() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other:
        count: int = 0
        mine: int = 0

    assert split_options({"count": "1", "mine": "2"}, Options, Other) == [{"count": "1"}, {"mine": "2"}]


def test_choice_reads_every_owners_options() -> None:
    choice = choose("clear?weight_bits=16&wire=1&share_inputs=0")
    assert choice.backend.weight_bits == 16
    assert choice.transport.options.wire is True
    assert choice.options.share_inputs is False
    assert choice.options.allow_insecure is False


def test_local_takes_no_endpoint() -> None:
    with pytest.raises(SelectionError, match="no endpoint"):
        ciphertune.outsource(nn.Sequential(nn.Linear(2, 2)), "clear+local://10.0.0.1:5555")


def test_local_is_not_served_and_needs_a_worker() -> None:
    transport = choose("clear").transport
    with pytest.raises(SelectionError, match="local transport cannot serve"):
        type(transport).listen(None, "x", {})  # type: ignore[arg-type]
    with pytest.raises(TransportError):
        transport.connect((), None)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    pass


class FarTransport(Transport):
    """Stands for other machines: hands requests to a worker that the client did not make."""

    name = "far"
    Options = NoOptions
    remote = True
    worker: Worker

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> Sequence[Link]:
        assert endpoints == ("host:1",)
        assert worker is None, "weights were handed to a remote transport"
        return choose("clear?wire=1").transport.connect((), self.worker)


@pytest.mark.parametrize("backend", ["clear", "simulation"])
def test_sending_in_the_clear_needs_to_be_said(register: Any, backend: str) -> None:
    register(registry.TRANSPORTS, FarTransport)
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(SecurityError, match="allow_insecure=1"):
        ciphertune.outsource(model, f"{backend}+far://host:1")
    with pytest.raises(SecurityError):
        ciphertune.outsource(model, f"{backend}+far://host:1?allow_insecure=0")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("to", ["clear+far://host:1?allow_insecure=1", "mlwe+far://host:1"])
def test_remote_worker(register: Any, to: str) -> None:
    register(registry.TRANSPORTS, FarTransport)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    expected = model(x).detach()
    FarTransport.worker = Worker(WeightStore.of({"0": quantize(model[0].weight, choose(to).backend.weight_bits)}))  # type: ignore[arg-type]
    seen = seen_by(FarTransport.worker)
    ciphertune.outsource(model, to)
    torch.testing.assert_close(model(x).detach(), expected, rtol=0.05, atol=0.05)
    assert [request.kind for request in seen] == ["hello", "manifest", "open", "evaluate"]
    with pytest.raises(OutsourcedWeightError, match="other machines"):
        ciphertune.restore(model)
    assert ciphertune.share(model).layers == 1


def test_a_plugin_that_cannot_be_imported_is_named(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(registry.TRANSPORTS, FarTransport)
    row = registry.installed(registry.TRANSPORTS)["far"]

    def fail() -> None:
        raise ImportError("no module named nothing")

    monkeypatch.setattr(row.entry_point, "load", fail)
    with pytest.raises(PluginError, match=r"'far' \(test:FarTransport, from test 1.0\).*ImportError: no module named"):
        choose("mlwe+far://host:1")


@dataclasses.dataclass(frozen=True)
class AroundOptions:
    wire: int = 0


@dataclasses.dataclass(frozen=True)
class ClashingOptions:
    wire: int = 0
    local_wire: int = 0


class AroundTransport(WrappingTransport):
    """Hands on the links as they are; its option is one of ``local`` as well."""

    name = "around"
    Options: ClassVar[type] = AroundOptions

    def wrap(self, link: Link) -> Link:
        if self.options.wire == 13:
            raise SelectionError("no luck")
        return link


def test_chains_are_read(register: Any) -> None:
    register(registry.TRANSPORTS, AroundTransport)
    selection = Selection.parse("mlwe+around::around::local://?wire=1")
    assert selection.transport == "around::around::local"
    assert Selection.parse(str(selection)) == selection
    for bad in (
        "mlwe+::local://",
        "mlwe+around::://",
        "mlwe+around:local://",
        "around::local",
        "mlwe+around::Local://",
    ):
        with pytest.raises(SelectionError, match="cannot read"):
            Selection.parse(bad)


def test_options_that_both_transports_have(register: Any) -> None:
    """The outer one's under its own name, the inner one's under both; each is checked as ever."""
    register(registry.TRANSPORTS, AroundTransport)
    transport: Any = choose("clear+around::local://?wire=7&local_wire=1").transport
    assert (transport.options.wire, transport.inner.options.wire) == (7, True)
    twice: Any = choose("clear+around::around::local://?wire=7&around_wire=8&local_wire=1").transport
    assert (twice.options.wire, twice.inner.options.wire, twice.inner.inner.options.wire) == (7, 8, True)
    assert choose("clear+around::local://").transport.options.wire == 0
    with pytest.raises(SelectionError, match="local_wire"):
        choose("clear+around::local://?local_wire=perhaps")
    with pytest.raises(SelectionError, match="'zmq_wire'"):
        choose("mlwe+around::zmq://127.0.0.1:1?zmq_wire=1")

    class Clashing(AroundTransport):
        name = "clashing"
        Options: ClassVar[type] = ClashingOptions

    register(registry.TRANSPORTS, Clashing)
    with pytest.raises(SelectionError, match="cannot wrap 'local'.*local_wire"):
        choose("clear+clashing::local://")


def test_what_is_sent_by_a_chain_is_as_remote_as_its_end(register: Any) -> None:
    register(registry.TRANSPORTS, AroundTransport)
    assert not choose("clear+around::local://").transport.remote
    with pytest.raises(SecurityError, match="'around::zmq' sends data to other processes"):
        choose("clear+around::zmq://127.0.0.1:1?insecure=1")


def test_a_chain_of_what_cannot_be_one(register: Any) -> None:
    register(registry.TRANSPORTS, AroundTransport)
    with pytest.raises(SelectionError, match="'local' wraps no other"):
        choose("clear+local::around://")
    with pytest.raises(SelectionError, match="has to be named: around::zmq"):
        choose("clear+around://")
    with pytest.raises(SelectionError, match="unknown transport 'arround'"):
        choose("clear+arround::local://")


def test_links_are_closed_where_one_cannot_be_wrapped(register: Any) -> None:
    register(registry.TRANSPORTS, AroundTransport)
    transport = choose("clear+around::local://?wire=13").transport
    closed: list[Link] = []
    inner = transport.inner.connect  # type: ignore[attr-defined]

    def connect(endpoints: tuple[str, ...], worker: LocalWorker | None) -> Sequence[Link]:
        links: Sequence[Link] = inner(endpoints, worker)
        for link in links:
            link.close = lambda link=link: closed.append(link)  # type: ignore[method-assign, misc]
        return links

    transport.inner.connect = connect  # type: ignore[attr-defined]
    with pytest.raises(SelectionError, match="no luck"):
        transport.connect((), Worker(WeightStore()))
    assert len(closed) == 1
