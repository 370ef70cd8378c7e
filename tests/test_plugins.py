"""Hook plugins: registration, gates that count, observers that cannot break a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune import VetoError, hookimpl
from ciphertune.errors import NothingOutsourcedError, PluginError, SecurityError, UnknownLayerError
from ciphertune.plugins import PluginManager, plugin_manager


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def test_exchanges_carry_layers_counts_and_times(recorder: Any) -> None:
    net = ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    x = torch.randn(5, 4, requires_grad=True)
    net(x).sum().backward()
    assert [(e.layers, e.direction, e.tokens) for e in recorder.answered] == [
        (("0",), "forward", 5),
        (("1",), "forward", 5),
        (("1",), "backward", 5),
        (("0",), "backward", 5),
    ]
    assert [(e.bytes_up, e.bytes_down) for e in recorder.answered] == [(80, 120), (120, 40), (40, 120), (120, 80)]
    assert recorder.asked == recorder.answered
    assert all(e.wait_seconds >= e.evaluate_seconds > 0 for e in recorder.answered)
    traffic = ciphertune.session_of(net).traffic
    assert (traffic.requests, traffic.bytes_up, traffic.bytes_down) == (4, 360, 360)
    assert traffic.wait_seconds == pytest.approx(sum(e.wait_seconds for e in recorder.answered))
    assert traffic.since(traffic).requests == 0


def test_sessions_are_announced(recorder: Any) -> None:
    net = ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    session = ciphertune.session_of(net)
    assert recorder.opened == [session]
    session.close()
    session.close()
    assert recorder.closed == [session]
    with pytest.raises(SecurityError, match="closed"):
        net(torch.randn(1, 4))
    assert recorder.asked == []


class Refuser:
    @hookimpl
    def ciphertune_before_request(self, exchange: Any) -> None:
        if exchange.direction == "backward":
            raise VetoError(f"gradients of {exchange.layers[0]} stay here")


def test_veto_stops_the_request(recorder: Any) -> None:
    recorder.plugins.register(Refuser())
    net = ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    y = net(torch.randn(3, 4, requires_grad=True))
    worker = ciphertune.session_of(net).worker
    served = worker.stats.requests
    with pytest.raises(VetoError, match="gradients of 1 stay here"):
        y.sum().backward()
    assert worker.stats.requests == served
    assert recorder.products("backward") == []


class Clumsy:
    """Fails in every observer."""

    @hookimpl
    def ciphertune_session_opened(self, session: Any) -> None:
        raise RuntimeError("opened badly")

    @hookimpl
    def ciphertune_after_reply(self, exchange: Any) -> None:
        raise KeyError("reply")

    @hookimpl
    def ciphertune_session_closed(self, session: Any) -> None:
        raise ValueError("closed badly")


def test_a_failing_observer_warns_and_the_others_still_see(recorder: Any) -> None:
    recorder.plugins.register(Clumsy(), "clumsy")
    reference = model()
    with pytest.warns(RuntimeWarning, match=r"'clumsy' failed in ciphertune_session_opened: RuntimeError: opened"):
        net = ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    x = torch.randn(2, 4)
    with pytest.warns(RuntimeWarning, match="'clumsy' failed in ciphertune_after_reply: KeyError"):
        y = net(x)
    torch.testing.assert_close(y, reference(x))
    with pytest.warns(RuntimeWarning, match="'clumsy' failed in ciphertune_session_closed"):
        ciphertune.session_of(net).close()
    assert (len(recorder.opened), len(recorder.answered), len(recorder.closed)) == (1, 2, 1)


class Chooser:
    def __init__(self, answer: Any) -> None:
        self.answer, self.seen = answer, None

    @hookimpl
    def ciphertune_select_layers(self, model: Any, candidates: Any) -> Any:
        self.seen = list(candidates)
        return self.answer


def test_a_plugin_chooses_layers_where_the_caller_did_not() -> None:
    plugins, chooser = PluginManager(), Chooser(["1"])
    plugins.register(chooser)
    net = ciphertune.outsource(model(), "clear", plugins=plugins)
    assert [layer.name for layer in ciphertune.outsourced_layers(net)] == ["1"]
    assert chooser.seen == ["0", "1"]
    chooser.seen = None
    named = ciphertune.outsource(model(), "clear", layers="0", plugins=plugins)
    assert [layer.name for layer in ciphertune.outsourced_layers(named)] == ["0"]
    assert chooser.seen is None


def test_the_first_plugin_that_answers_decides() -> None:
    plugins = PluginManager()
    plugins.register(Chooser(["0"]), "asked last")
    plugins.register(Chooser(None), "asked first")
    net = ciphertune.outsource(model(), "clear", plugins=plugins)
    assert [layer.name for layer in ciphertune.outsourced_layers(net)] == ["0"]


@pytest.mark.parametrize(("answer", "error"), [([], NothingOutsourcedError), (["7"], UnknownLayerError)])
def test_a_plugin_that_chooses_badly_is_an_error(answer: Any, error: type[Exception]) -> None:
    plugins = PluginManager()
    plugins.register(Chooser(answer))
    net = model()
    with pytest.raises(error):
        ciphertune.outsource(net, "clear", plugins=plugins)
    assert type(net[0]) is nn.Linear


class Misspelt:
    @hookimpl
    def ciphertune_after_replies(self, exchange: Any) -> None: ...


class WrongArgument:
    @hookimpl
    def ciphertune_after_reply(self, exchanges: Any) -> None: ...


@pytest.mark.parametrize("plugin", [Misspelt, WrongArgument])
def test_hooks_that_do_not_exist_are_refused(recorder: Any, plugin: type) -> None:
    with pytest.raises(PluginError, match="ciphertune_after_repl"):
        recorder.plugins.register(plugin(), "wrong")
    assert recorder.plugins.names() == ["recorder"]
    ciphertune.outsource(model(), "clear", plugins=recorder.plugins)(torch.randn(1, 4))
    assert len(recorder.answered) == 2


def test_registering_twice_is_refused_and_keeps_the_first(recorder: Any) -> None:
    with pytest.raises(PluginError, match="already registered"):
        recorder.plugins.register(recorder, "recorder")
    with pytest.raises(PluginError, match="already registered"):
        recorder.plugins.register(Chooser(None), "recorder")
    assert recorder.plugins.names() == ["recorder"]
    recorder.plugins.unregister(recorder)
    assert recorder.plugins.names() == []


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["progress"]),
        ("", []),
        ("progress", ["progress"]),
        (" traffic?path=a%2Cb.json ,progress,", ["progress", "traffic"]),
        ("traffic,traffic?path=t.json", ["traffic", "traffic-2"]),
    ],
)
def test_environment_says_what_is_active(monkeypatch: pytest.MonkeyPatch, value: str | None, names: list[str]) -> None:
    if value is None:
        monkeypatch.delenv("CIPHERTUNE_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("CIPHERTUNE_PLUGINS", value)
    manager = PluginManager()
    manager.load_installed()
    assert manager.names() == names
    assert manager.failed == {}
    if "a%2Cb" in (value or ""):
        assert manager._manager.get_plugin("traffic").path == Path("a,b.json")


def test_mistakes_in_the_environment_are_warned_of_and_the_rest_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIPHERTUNE_PLUGINS", "trafic,history?pth=a.csv,progress?x=1,progress,traffic")
    manager = PluginManager()
    with pytest.warns(RuntimeWarning) as found:
        manager.load_installed()
    assert len(found) == 3
    assert manager.names() == ["progress", "traffic"]
    assert "did you mean 'traffic'" in manager.failed["trafic"]
    assert "'history': unknown option 'pth'; did you mean 'path'" in manager.failed["history"]
    assert "takes no options" in manager.failed["progress"]


def test_the_process_has_one_manager() -> None:
    assert plugin_manager() is ciphertune.plugin_manager()
    assert ciphertune.session_of(ciphertune.outsource(model(), "clear")).plugins is plugin_manager()
