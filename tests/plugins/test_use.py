"""Plugins with options: naming them, what goes wrong, and when they are closed."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ciphertune.errors import PluginError, SelectionError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager, anchored
from ciphertune.runs.config import load_config
from ciphertune.selection import parse_use

Register = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class CounterOptions:
    start: int
    log: Path = Path("counter.log")
    name: str | None = None


class Counter:
    name = "counter"
    Options = CounterOptions

    def __init__(self, options: CounterOptions) -> None:
        self.options = options
        self.count = options.start
        self.closed = 0

    @hookimpl
    def ciphertune_session_opened(self) -> None:
        self.count += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def manager(register: Register) -> PluginManager:
    register(registry.PLUGINS, Counter)
    return PluginManager()


def test_a_plugin_is_used_with_options_until_it_is_unregistered(manager: PluginManager) -> None:
    counter = manager.use("counter?start=5&name=a+b%26c")
    assert isinstance(counter, Counter)
    assert counter.options == CounterOptions(5, Path("counter.log"), "a b&c")
    manager.observe("ciphertune_session_opened", session=None)
    assert counter.count == 6
    manager.unregister(counter)
    assert counter.closed == 1
    manager.observe("ciphertune_session_opened", session=None)
    assert counter.count == 6
    assert manager.names() == []


def test_a_class_may_be_used_more_than_once_with_other_options(manager: PluginManager) -> None:
    first, second = manager.use("counter?start=1"), manager.use("counter?start=2")
    assert manager.names() == ["counter", "counter-2"]
    with pytest.raises(PluginError, match="'counter' is in use with these options already"):
        manager.use("counter?start=1&name=none")
    manager.unregister(first)
    assert manager.use("counter?start=1") is not first
    assert manager.names() == ["counter", "counter-2"]
    assert (first.closed, second.closed) == (1, 0)


def test_what_is_always_active_can_be_named_too() -> None:
    manager = PluginManager()
    plugin = manager.use("progress")
    assert manager.use("progress") is plugin
    assert manager.names() == ["progress"]
    with pytest.raises(SelectionError, match="'progress' takes no options"):
        manager.use("progress?colour=red")
    with manager.using("progress"):
        pass
    assert manager.names() == ["progress"]


def test_a_class_is_not_registered_in_place_of_what_it_makes(manager: PluginManager) -> None:
    with pytest.raises(PluginError, match="Counter is a class: register what it makes"):
        manager.register(Counter)
    manager.register(Counter(CounterOptions(1)), "mine")
    assert manager.names() == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conter?start=1", "unknown plugin 'conter'; did you mean 'counter'"),
        ("counter", "plugin 'counter': option start is missing and has no default"),
        ("counter?strat=1", "plugin 'counter': unknown option 'strat'; did you mean 'start'"),
        ("counter?start=one", "plugin 'counter': option start='one' must be a whole number"),
        ("counter?start=1&start=2", "given twice"),
        ("counter?start", "expected name=value"),
        ("counter+zmq://?start=1", "expected name"),
        ("", "expected name"),
        ("Counter", "expected name"),
    ],
)
def test_mistakes_name_what_there_is(manager: PluginManager, text: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message.replace("?", r"\?")):
        manager.use(text)
    assert manager.names() == []


def test_use_takes_any_text_or_says_no() -> None:
    assert parse_use("a-b_c?x=1&y=?&z=") == ("a-b_c", {"x": "1", "y": "?", "z": ""})
    assert parse_use(" mlflow?uri=https://host:5000/a ") == ("mlflow", {"uri": "https://host:5000/a"})


class Broken(Counter):
    name = "broken"

    def __init__(self, options: CounterOptions) -> None:
        raise ZeroDivisionError("in the constructor")


class Misspelt(Counter):
    name = "misspelt"
    made: list[Misspelt] = []  # noqa: RUF012

    def __init__(self, options: CounterOptions) -> None:
        super().__init__(options)
        self.made.append(self)

    @hookimpl
    def ciphertune_session_open(self) -> None: ...


class Bare:
    name = "bare"


def test_plugins_that_cannot_be_set_up(manager: PluginManager, register: Register) -> None:
    for plugin in (Broken, Misspelt, Bare):
        register(registry.PLUGINS, plugin)
    with pytest.raises(PluginError, match="'broken' cannot be set up: ZeroDivisionError: in the constructor"):
        manager.use("broken?start=1")
    with pytest.raises(PluginError, match="'misspelt'.*did you mean ciphertune_session_opened"):
        manager.use("misspelt?start=1")
    assert Misspelt.made == []
    with pytest.raises(PluginError, match="'bare' .* cannot be used: it implements no hook"):
        manager.use("bare")
    assert manager.names() == []


def test_plugins_of_a_block_are_closed_however_it_ends(manager: PluginManager) -> None:
    with contextlib.suppress(KeyError), manager.using("counter?start=1", "counter?start=2") as counters:
        assert manager.names() == ["counter", "counter-2"]
        raise KeyError
    assert [counter.closed for counter in counters] == [1, 1]
    with pytest.raises(SelectionError), manager.using("counter?start=1", "nothing"):
        raise AssertionError("not reached")
    assert manager.names() == []


class Stuck(Counter):
    name = "stuck"

    def close(self) -> None:
        raise OSError("still busy")


def test_one_that_fails_to_close_is_named_in_a_warning(manager: PluginManager, register: Register) -> None:
    register(registry.PLUGINS, Stuck)
    with (
        pytest.warns(RuntimeWarning, match="'stuck' failed to close: OSError: still busy"),
        manager.using("counter?start=1", "stuck?start=1") as (counter, _),
    ):
        pass
    assert counter.closed == 1
    assert manager.names() == []


def test_paths_in_a_file_are_relative_to_it(manager: PluginManager, tmp_path: Path) -> None:
    here = anchored("counter?start=1&name=x/y&log=logs/a b.txt", tmp_path)
    assert manager.use(here).options == CounterOptions(1, tmp_path / "logs/a b.txt", "x/y")
    assert manager.use(anchored("counter?start=2", tmp_path)).options.log == tmp_path / "counter.log"
    assert manager.use(anchored(f"counter?start=3&log={tmp_path.parent}/b", tmp_path)).options.log == (
        tmp_path.parent / "b"
    )
    assert anchored("progress", tmp_path) == "progress"
    file = tmp_path / "train.toml"
    text = '[model]\nname="m"\n[data]\nsource="d"\n[training]\noutput="o"\n'
    file.write_text('plugins = ["counter?start=4", "progress"]\n' + text)
    plugins = load_config(file).plugins
    assert parse_use(plugins[0]) == ("counter", {"start": "4", "log": str(tmp_path / "counter.log")})
    assert plugins[1] == "progress"
    file.write_text('plugins = ["counter?strat=4"]\n' + text)
    with pytest.raises(SelectionError, match="'counter': unknown option 'strat'"):
        load_config(file)


@pytest.mark.parametrize(
    ("use", "module", "extra"),
    [
        ("tensorboard?folder=x", "tensorboardX", "tensorboard"),
        ("mlflow", "mlflow", "mlflow"),
        ("prometheus", "prometheus_client", "prometheus"),
    ],
)
def test_a_missing_package_is_named_with_how_to_get_it(
    use: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PluginError, match=rf'plugin \'{extra}\': needs .*: pip install "ciphertune\[{extra}\]"'):
        PluginManager().use(use)
