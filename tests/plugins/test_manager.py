"""Hook plugins: registration, gates that count, observers that cannot break a run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from seen import seen_by
from torch import nn

import ciphertune
from ciphertune import LoraTrainer
from ciphertune.errors import NothingOutsourcedError, PluginError, SecurityError, UnknownLayerError, VetoError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.selection import parse_use


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
    seen = seen_by(ciphertune.session_of(net).worker)
    with pytest.raises(VetoError, match="gradients of 1 stay here"):
        y.sum().backward()
    assert not seen
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
        self.answer = answer
        self.seen: list[str] | None = None

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
        (None, ["progress", "ray"]),
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
        assert parse_use("traffic?path=a%2Cb.json") == ("traffic", {"path": "a,b.json"})
        with pytest.raises(PluginError, match="in use with these options already"):
            manager.use("traffic?path=a%2Cb.json")


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
    assert plugin_manager() is ciphertune.plugins.manager.plugin_manager()
    assert ciphertune.session_of(ciphertune.outsource(model(), "clear")).plugins is plugin_manager()


class Stubborn:
    """Fails at every reply."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def ciphertune_after_reply(self, exchange: Any) -> None:
        self.seen.append(exchange)
        raise RuntimeError(f"number {len(self.seen)}")


def test_a_plugin_that_keeps_failing_is_named_at_the_first_the_tenth_and_the_hundredth_time() -> None:
    manager, stubborn = PluginManager(), Stubborn()
    manager.register(stubborn, "stubborn")
    session = ciphertune.session_of(ciphertune.outsource(model(), "clear", plugins=manager))
    with pytest.warns(RuntimeWarning) as found:
        on_threads(4, products, session, 30)
    assert len(stubborn.seen) == session.traffic.requests == 120
    texts = [str(warning.message) for warning in found]
    assert len(texts) == 3
    assert "in ciphertune_after_reply: RuntimeError: number" in texts[0]
    assert sum("(10 times so far)" in text for text in texts) == 1
    assert sum("(100 times so far)" in text for text in texts) == 1
    manager.unregister(stubborn)
    manager.register(stubborn, "stubborn")
    with pytest.warns(RuntimeWarning, match="after_reply: RuntimeError: number 121"):
        products(session, 1)


def on_threads(count: int, target: Any, *arguments: Any) -> None:
    threads = [threading.Thread(target=target, args=arguments) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def products(session: Any, count: int) -> None:
    for _ in range(count):
        session.product(0, "forward", torch.randn(2, 4))


class Interrupts:
    def __init__(self, hook: str) -> None:
        self.reasons: list[str] = []
        self.hook = hook

    @hookimpl
    def ciphertune_session_opened(self) -> None:
        if self.hook == "session_opened":
            raise KeyboardInterrupt

    @hookimpl
    def ciphertune_training_start(self) -> None:
        if self.hook == "training_start":
            raise KeyboardInterrupt

    @hookimpl
    def ciphertune_training_step(self, step: int) -> None:
        if self.hook == "training_step" and step == 2:
            raise SystemExit(3)

    @hookimpl
    def ciphertune_training_end(self, reason: str) -> None:
        self.reasons.append(reason)


def trainer_of(plugins: PluginManager, **arguments: Any) -> LoraTrainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    net[2].requires_grad_(False)
    ciphertune.outsource(net, "clear", plugins=plugins)
    return LoraTrainer(net, loss_fn=nn.functional.mse_loss, learning_rate=0.1, plugins=plugins, **arguments)


BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(n)), torch.zeros(8, 2)) for n in range(6)]


def test_interruptions_pass_through_observers_and_end_the_run() -> None:
    for hook, error in (("training_start", KeyboardInterrupt), ("training_step", SystemExit)):
        manager, plugin = PluginManager(), Interrupts(hook)
        manager.register(plugin)
        with pytest.raises(error):
            trainer_of(manager).train(BATCHES)
        assert plugin.reasons == ["interrupted"]


def test_an_interruption_while_a_session_opens_closes_it(recorder: Any) -> None:
    recorder.plugins.register(Interrupts("session_opened"))
    with pytest.raises(KeyboardInterrupt):
        ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    (session,) = recorder.closed
    assert session.closed


def test_warnings_that_are_errors_come_after_every_plugin_was_called(recorder: Any) -> None:
    recorder.plugins.register(Clumsy(), "clumsy")  # called first
    with pytest.raises(RuntimeWarning, match="'clumsy' failed in ciphertune_session_closed"):
        ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    assert recorder.opened == recorder.closed != []


class RefusesLater:
    """Refuses one product in the middle of training, once."""

    def __init__(self, direction: str) -> None:
        self.left = 3
        self.direction = direction

    @hookimpl
    def ciphertune_before_request(self, session: Any, exchange: Any) -> None:
        assert session.security.encrypted is False
        if exchange.direction == self.direction:
            self.left -= 1
            if self.left == 0:
                raise VetoError("not this one")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_after_a_veto_nothing_is_lost(direction: str, tmp_path: Path) -> None:
    whole = trainer_of(PluginManager()).train(BATCHES).losses
    manager = PluginManager()
    manager.register(RefusesLater(direction))
    trainer = trainer_of(manager, checkpoint_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(VetoError, match="not this one"):
        trainer.train(BATCHES)
    assert trainer.history.losses == whole[:2]
    assert trainer.step == 2
    assert all(p.grad is None for p in trainer.model.parameters())
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    # The same objects go on, as a new process would.
    assert trainer.train(BATCHES, resume=True).losses == whole
    assert not all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    again = trainer_of(PluginManager(), checkpoint_dir=tmp_path, epochs=2)
    again.train(BATCHES, resume=True)
    assert again.history.losses[:6] == whole


def test_after_a_veto_layers_that_are_evaluated_together_still_are(recorder: Any, tiny: Any) -> None:
    class Once:
        armed = True

        @hookimpl
        def ciphertune_before_request(self, exchange: Any) -> None:
            if self.armed and len(exchange.layers) > 1:
                self.armed = False
                raise VetoError("not now")

    expected = tiny("llama")(torch.arange(8)[None]).logits
    recorder.plugins.register(Once())
    net = ciphertune.outsource(tiny("llama"), "clear", plugins=recorder.plugins)
    with pytest.raises(VetoError):
        net(torch.arange(8)[None])
    assert recorder.answered == []
    torch.testing.assert_close(net(torch.arange(8)[None]).logits, expected)
    assert any(len(exchange.layers) == 3 for exchange in recorder.answered)


class Meddler:
    @hookimpl
    def ciphertune_training_step(self, metrics: Any) -> None:
        metrics["loss"] = -1.0

    @hookimpl
    def ciphertune_evaluation(self, metrics: Any) -> None:
        metrics.clear()


def test_a_plugin_cannot_change_the_history() -> None:
    manager = PluginManager()
    manager.register(Meddler())
    history = trainer_of(manager).train(BATCHES, BATCHES[:1])
    assert min(history.losses) >= 0
    assert history.evaluations[-1]["eval_loss"] >= 0


class Wraps:
    @hookimpl(wrapper=True)
    def ciphertune_after_reply(self) -> Any:
        return (yield)


class Async:
    @hookimpl
    async def ciphertune_training_step(self) -> None: ...


class Yields:
    @hookimpl
    def ciphertune_before_request(self) -> Any:
        yield


@pytest.mark.parametrize("plugin", [Wraps, Async, Yields])
def test_hooks_that_would_never_run_are_refused(plugin: type) -> None:
    manager = PluginManager()
    with pytest.raises(PluginError, match="must be an ordinary function"):
        manager.register(plugin(), "wrong")
    assert manager.names() == []


def test_a_gate_may_be_wrapped(recorder: Any) -> None:
    class Softens:
        @hookimpl(wrapper=True)
        def ciphertune_before_request(self) -> Any:
            try:
                return (yield)
            except VetoError:
                return []

    recorder.plugins.register(Refuser())
    recorder.plugins.register(Softens())
    net = ciphertune.outsource(model(), "clear", plugins=recorder.plugins)
    net(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert len(recorder.products("backward")) == 2


def test_a_trace_names_hooks_and_plugins_and_no_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIPHERTUNE_TRACE_PLUGINS", "1")
    manager = PluginManager()
    manager.register(Meddler(), "first")
    manager.register(Meddler(), "second")
    trainer_of(manager).train(BATCHES[:1])
    written = capsys.readouterr()
    lines = written.err.splitlines()
    assert "ciphertune_training_start(trainer=LoraTrainer, total_steps=1, start_step=0) -> no plugin" in lines
    assert "ciphertune_before_request(session=Session, exchange=Exchange) -> no plugin" in lines
    assert "ciphertune_training_step(trainer=LoraTrainer, step=1, metrics=dict) -> second, first" in lines
    assert "ciphertune_training_end(trainer=LoraTrainer, step=1, reason='finished') -> no plugin" in lines
    manager.observe("ciphertune_session_closed", session=torch.tensor([0.125]))
    assert capsys.readouterr().err == "ciphertune_session_closed(session=Tensor) -> no plugin\n"
    assert written.out == ""
    monkeypatch.setenv("CIPHERTUNE_TRACE_PLUGINS", "0")
    trainer_of(PluginManager()).train(BATCHES[:1])
    assert capsys.readouterr().err == ""


def test_one_can_be_switched_off_without_listing_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, names in (("no:ray", ["progress"]), ("no:ray,traffic", ["progress", "traffic"])):
        monkeypatch.setenv("CIPHERTUNE_PLUGINS", value)
        manager = PluginManager()
        manager.load_installed()
        assert manager.names() == names
        assert manager.failed == {}
    monkeypatch.setenv("CIPHERTUNE_PLUGINS", "no:progess")
    manager = PluginManager()
    with pytest.warns(RuntimeWarning, match="switches off 'progess', which is not there; did you mean 'progress'"):
        manager.load_installed()
    assert manager.names() == ["progress", "ray"]


def test_order_is_that_of_registering_unless_a_hook_says_first_or_last() -> None:
    manager, called = PluginManager(), []

    def plugin(name: str, first: bool = False, last: bool = False) -> Any:
        @hookimpl(tryfirst=first, trylast=last)
        def ciphertune_session_closed() -> None:
            called.append(name)

        return type(name, (), {"ciphertune_session_closed": staticmethod(ciphertune_session_closed)})()

    for name, order in (("first", {"first": True}), ("last", {"last": True}), ("one", {}), ("two", {})):
        manager.register(plugin(name, **order), name)
    manager.observe("ciphertune_session_closed", session=None)
    assert called == ["first", "two", "one", "last"]
