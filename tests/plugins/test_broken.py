"""Plugins that are broken on purpose: each costs its user one clear message, and nobody else anything."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import textwrap
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from shipped import child, ship
from torch import Tensor, nn

import ciphertune
from ciphertune.backend import Encrypted
from ciphertune.cli import LazyGroup, main
from ciphertune.errors import PluginError, SelectionError, TransportError, WorkerError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager
from ciphertune.transport import Link, WrappingTransport

Register = Callable[[str, Any], None]

MODULE = """
import dataclasses
import enum
import sys
from ciphertune import get_backend, get_transport
from ciphertune.backend import Backend
from ciphertune.hookspecs import hookimpl
from ciphertune.transport import Transport

Clear, Local = get_backend("clear"), get_transport("local")

def function(): ...

class Bare: name = "bare"

class Abstract(Backend): name, Options = "abstract", Clear.Options

class Alias(Clear): name = "another"

class Method(Clear):
    name = "method"
    def security(self): ...

class Stating(Clear):
    name = "stating"
    security = property(lambda self: "very safe")

class Colour(enum.Enum): RED = 1

@dataclasses.dataclass(frozen=True)
class ColourOptions: colour: Colour = Colour.RED

class Coloured(Clear): name, Options = "coloured", ColourOptions

@dataclasses.dataclass(frozen=True)
class UnresolvedOptions: size: "Sighs" = 1

class Unresolved(Clear): name, Options = "unresolved", UnresolvedOptions

@dataclasses.dataclass(frozen=True)
class TakenOptions: timeout: float = 1.0

class Taken(Local): name, Options = "taken", TakenOptions

class Later(Clear): name, interface = "later", 2

class Exploding(Clear):
    name = "exploding"
    def __init__(self, *_): raise ZeroDivisionError("no such device")

class Greedy(Clear):
    name = "greedy"
    def __init__(self, options): super().__init__(options)

class Narrow(get_transport("flaky")):
    name = "narrow"
    def __init__(self, options, inner): super().__init__(options, inner)

class Mute(Local): name, ServeOptions = "mute", Local.Options

class Misspelt:
    @hookimpl
    def ciphertune_after_replie(self, exchange): ...

class Unmarked:
    def ciphertune_after_reply(self, exchange): ...
"""
# Entry point → what its user is told.
BROKEN = {
    ("backends", "function"): "it is a function, and must be a subclass of ciphertune.backend.Backend",
    ("backends", "bare"): "it is the class Bare, and must be a subclass of ciphertune.backend.Backend",
    ("backends", "abstract"): "leaves client, security, worker of ciphertune.backend.Backend without",
    ("backends", "alias"): "Alias calls itself 'another': its attribute 'name' must be the entry point's, 'alias'",
    ("backends", "method"): "Method.security is a method, and must be a property",
    ("backends", "stating"): "'security' is a str, and must be a ciphertune.backend.SecurityStatement",
    ("backends", "coloured"): "no text can be read as the type of its field 'colour', Colour",
    ("backends", "unresolved"): "the types of its fields cannot be resolved: NameError: name 'Sighs' is not defined",
    ("backends", "later"): "written for version 2 of the interface, and this is version 1",
    ("backends", "exploding"): "failed in its set-up: ZeroDivisionError: no such device",
    ("backends", "gone"): "cannot be imported: AttributeError: module 'broken_plugins' has no attribute 'Gone'",
    ("backends", "leaving"): "cannot be imported: SystemExit: 3",
    ("backends", "clear"): "'clear' is the name of CipherTune's own backend",
    ("backends", "greedy"): "Greedy.__init__ cannot be called as the framework does: leave it out",
    ("transports", "narrow"): "or write 'def __init__(self, options=None, inner=None)' and call super()",
    ("transports", "taken"): "Taken.Options has timeout, an option of every selection string",
    ("transports", "mute"): "Mute has ServeOptions and no 'serve'",
    ("plugins", "misspelt"): "there is no hook ciphertune_after_replie; did you mean ciphertune_after_reply?",
    ("plugins", "unmarked"): "ciphertune_after_reply is not marked with ciphertune.hookspecs.hookimpl",
    ("plugins", "twin"): "'twin' is registered 2 times in ciphertune.plugins: by broken 1.0 (broken_plugins:Bare)",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a program that uses none of the broken plugins sees, and what it is told that asks for each."""
    folder = tmp_path_factory.mktemp("broken")
    lines: dict[str, list[str]] = {}
    targets = {"gone": "broken_plugins:Gone", "leaving": "leaving_plugin:Backend", "clear": "broken_plugins:Bare"}
    for group, name in BROKEN:
        target = targets.get(name, f"broken_plugins:{name if name == 'function' else name.title()}")
        lines.setdefault(group, []).append(f"{name} = {target.replace(':Twin', ':Bare')}")
    points = "\n".join(f"[ciphertune.{group}]\n" + "\n".join(each) for group, each in lines.items())
    ship(folder, "broken", points, broken_plugins=MODULE, leaving_plugin="import sys\nsys.exit(3)")
    ship(folder, "other", "[ciphertune.plugins]\ntwin = other_plugin\n")
    ship(
        folder,
        "older",
        "[ciphertune.backends]\nolder = older_plugin:Older\n",
        requires="ciphertune<0.1",
        older_plugin="from ciphertune import get_backend\nclass Older(get_backend('clear')): name = 'older'\n",
    )
    printed = child(
        """
        import contextlib, io, json, warnings
        import torch, ciphertune
        from ciphertune.cli.installed import everything
        from ciphertune.errors import CipherTuneError
        from ciphertune.plugins import registry
        from ciphertune.plugins.manager import PluginManager

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = ciphertune.outsource(torch.nn.Sequential(torch.nn.Linear(4, 3)), "clear", "all")
            y = model(torch.ones(2, 4)).shape
        asked = {}
        for group in registry.KINDS:
            for row in registry.installed(group).values():
                if row.name != "clear" and not row.distribution.startswith("broken"):
                    continue
                try:
                    if group == registry.BACKENDS:
                        ciphertune.outsource(torch.nn.Sequential(torch.nn.Linear(4, 3)), row.name, "all")
                    elif group == registry.TRANSPORTS:
                        registry.get_transport(row.name)
                    else:
                        PluginManager().use(row.name)
                except CipherTuneError as error:
                    asked[f"{group} {row.name}"] = f"{type(error).__name__}: {error}"
        rows = everything()
        print(json.dumps([list(y), [str(w.message) for w in caught], asked, rows], default=str))
        """,
        folder,
        CIPHERTUNE_PLUGINS="no:ray",
    )
    shape, warned, asked, rows = json.loads(printed.splitlines()[-1])
    return {"shape": shape, "warned": warned, "asked": asked, "rows": rows}


def test_whoever_uses_none_of_them_trains_as_ever(told: dict[str, Any]) -> None:
    assert told["shape"] == [2, 3]
    # Hook plugins that are always active, and cannot be: once each. Of the clash nobody is told who did not ask.
    assert len(told["warned"]) == 2
    assert all("from broken 1.0" in text for text in told["warned"])
    assert not any("twin" in text for text in told["warned"])


@pytest.mark.parametrize(("group", "name"), BROKEN)
def test_whoever_asks_for_one_is_told(told: dict[str, Any], group: str, name: str) -> None:
    said = told["asked"].get(f"ciphertune.{group} {name}")
    if name == "clear":
        assert said is None, "CipherTune's own"
        return
    assert BROKEN[group, name] in said
    assert said.startswith("PluginError: ")
    assert "broken 1.0" in said
    assert "broken_plugins" in said or "leaving_plugin" in said
    assert "\n" not in said
    assert any(remedy in said for remedy in ("uninstall", "fault of the plugin", "cannot be imported"))


@pytest.mark.parametrize(("group", "name"), BROKEN)
def test_lists_have_a_line_for_each(told: dict[str, Any], group: str, name: str) -> None:
    rows = [row for row in told["rows"] if (f"{row['kind']}s", row["name"]) == (group, name)]
    (row,) = [row for row in rows if row["package"] == "broken 1.0"]
    assert row["state"] == "refused"
    assert BROKEN[group, name].removeprefix("failed in its set-up: ") in row["reason"]


def test_lists_have_the_others_as_they_are(told: dict[str, Any]) -> None:
    rows = {(row["kind"], row["name"], row["package"].partition(" ")[0]): row for row in told["rows"]}
    for kind, name in (("backend", "clear"), ("backend", "mlwe"), ("transport", "local")):
        row = rows[kind, name, "ciphertune"]
        assert (row["state"], row["reason"], row["mismatch"], row["interface"]) == ("usable", None, None, 1)
    assert rows["plugin", "progress", "ciphertune"]["state"] == "active"
    assert rows["plugin", "ray", "ciphertune"]["state"] == "off (CIPHERTUNE_PLUGINS)"
    assert rows["plugin", "twin", "other"]["state"] == "refused"
    older = rows["backend", "older", "older"]
    assert older["state"] == "usable"
    assert f"older 1.0 is made for ciphertune<0.1, and {ciphertune.__version__} is installed" in older["mismatch"]


LACKING = """
import dataclasses
from ciphertune.transport import Loopback, Transport

class Lacking(Transport):
    name = "lacking"

    @dataclasses.dataclass(frozen=True)
    class Options: token: str = ""

    ServeOptions = Options

    def connect(self, endpoints, worker):
        import quantum_link.client

    def check(self, endpoints):
        import quantum_link.client

    @classmethod
    def loopback(cls, folder, options):
        import quantum_link.keys

    @classmethod
    def serve(cls, handler, address, options):
        import quantum_link.server
"""


def test_a_package_that_a_plugin_needs_is_named_where_it_is_first_used(tmp_path: Path) -> None:
    points = "[ciphertune.transports]\nlacking = lacking_plugin:Lacking\nwanting = wanting_plugin:Wanting\n"
    wanting = "import superposition\n"
    ship(tmp_path, "lacking", points, "quantum-link>=2,<3", lacking_plugin=LACKING, wanting_plugin=wanting)
    ciphertune.split(nn.Sequential(nn.Linear(4, 3)), tmp_path / "bundle", layers="all")
    run = 'to = "clear+lacking://x?allow_insecure=1"\nmodel.name = "x"\ndata.source = "x"\ntraining.output = "out"\n'
    (tmp_path / "train.toml").write_text(run)
    worker = ["worker", str(tmp_path / "bundle/worker"), "--transport", "lacking", "--bind", "x"]
    commands = [
        ["bench", "link", "--to", "clear+lacking://?allow_insecure=1"],
        ["bench", "link", "--to", "clear+lacking://x?allow_insecure=1"],
        ["top", "lacking://x", "--once"],
        ["train", str(tmp_path / "train.toml")],
        worker,
        ["top", "wanting://x", "--once"],
    ]
    printed = child(
        f"""
        import contextlib, io, json
        from ciphertune.cli import main
        said = []
        for arguments in {commands!r}:
            with contextlib.redirect_stderr(io.StringIO()) as stream, contextlib.redirect_stdout(io.StringIO()):
                try:
                    main(arguments)
                except SystemExit as end:
                    said.append([end.code, stream.getvalue()])
        print(json.dumps(said))
        """,
        tmp_path,
    )
    *uses, load = json.loads(printed.splitlines()[-1])
    for (status, text), what in zip(uses, ("loopback", "connect", "connect", "check", "serve"), strict=True):
        assert status == 1
        assert f"transport 'lacking' (lacking_plugin:Lacking, from lacking 1.0) failed in '{what}': " in text
        assert "the package 'quantum_link' is not installed: pip install 'quantum-link<3,>=2'\n" in text
        assert "fault of" not in text
    assert load[0] == 1
    # Which package holds that module, its plugin does not say.
    assert "cannot be imported: the package 'superposition' is not installed: pip install 'lacking'" in load[1]


def test_a_package_that_a_command_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Any, context: Any) -> None:
        importlib.import_module("quantum_link")

    monkeypatch.setattr(LazyGroup, "invoke", run)
    with pytest.raises(SystemExit) as end:
        main(["backends"])
    assert end.value.code == 1
    assert (
        capsys.readouterr().err
        == "ciphertune: the package 'quantum_link' is not installed: pip install 'quantum_link'\n"
    )


# Faults of a plugin at work: in this process.

Clear = ciphertune.get_backend("clear")
Local = ciphertune.get_transport("local")


def product(backend: str = "clear", transport: str = "local", **options: Any) -> Tensor:
    query = "&".join(f"{name}={value}" for name, value in {"deadline": 60, **options}.items())
    model = ciphertune.outsource(
        nn.Sequential(nn.Linear(4, 3)), f"{backend}+{transport}://?{query}", "all", plugins=PluginManager()
    )
    try:
        y: Tensor = model(torch.full((2, 4), 0.7310585))
        return y
    finally:
        ciphertune.session_of(model).close()


def fail(*_: Any) -> Any:
    raise KeyError("0.7310585")


def fault(where: str, what: Callable[..., Any]) -> Any:
    """The clear backend with one method in place of its own, at the client or at the worker."""

    class Faulty(Clear):  # type: ignore[misc, valid-type]
        name = "faulty"

        def client(self, device: torch.device) -> Any:
            half = super().client(device)
            if where in ("encrypt", "decrypt", "begin", "evaluation_key"):
                setattr(half, where, what)
            return half if where != "client" else what()

        @classmethod
        def worker(cls, *given: Any) -> Any:
            half = super().worker(*given)
            if where in ("evaluate", "prepare"):
                setattr(half, where, what)
            return half if where != "worker" else what()

    return Faulty


X = torch.zeros(2, 4)
NO_TENSORS: Any = {"x": 3}
AT_CLIENT = [
    ("client", lambda: "keys", "'client' gave a str, and must give a ciphertune.backend.ClientHalf"),
    ("begin", fail, "failed in 'begin': KeyError at plugins/test_broken.py"),
    ("evaluation_key", lambda: [X], "the evaluation key: it is a list, and must be a dict of tensors by name"),
    ("encrypt", fail, "failed in encryption: KeyError at plugins/test_broken.py"),
    ("encrypt", lambda x, whole: {"x": x}, "encryption gave a dict, and must give a ciphertune.backend.Encrypted"),
    ("encrypt", lambda x, whole: Encrypted({"x": x.half()}, 2), "'x' of type float16; messages carry uint8"),
    ("encrypt", lambda x, whole: Encrypted(NO_TENSORS, 2), "it has a int as 'x', and must have a tensor"),
    ("decrypt", fail, "failed in decryption: KeyError at plugins/test_broken.py"),
    ("decrypt", lambda *_: [0.7310585], "decryption gave a list, and must give a float32 tensor"),
    ("decrypt", lambda *_: torch.zeros(2, 3).double(), "decryption gave float64, and must give float32"),
    ("decrypt", lambda *_: torch.full((2, 3), math.nan), "gave 6 of 6 values that are NaN or infinite for 0 (forward)"),
    ("decrypt", lambda *_: torch.tensor([[0, 1, math.inf]] * 2), "gave 2 of 6 values that are NaN or infinite"),
]


@pytest.mark.parametrize(("where", "what", "said"), AT_CLIENT)
def test_a_backend_s_faults_at_the_client_are_its_own(
    register: Register, where: str, what: Callable[..., Any], said: str
) -> None:
    register(registry.BACKENDS, fault(where, what))
    with pytest.raises(PluginError) as caught:
        product("faulty")
    text = str(caught.value)
    assert said in text
    assert "backend 'faulty' (test:Faulty, from test 1.0)" in text
    assert "This is a fault of the plugin" in text
    assert "0.73" not in text, "what an error says may quote the data"
    assert product().shape == (2, 3)


AT_WORKER = [
    ("worker", lambda: "half", "gave a str and no ciphertune.backend.WorkerHalf"),
    ("prepare", fail, "preparing weights raised KeyError"),
    ("evaluate", fail, "evaluation raised KeyError"),
    ("evaluate", lambda *_: None, "the result of its evaluation is a NoneType, and must be a dict of tensors by name"),
    (
        "evaluate",
        lambda *_: {"y": X.bfloat16()},
        "the result of its evaluation has 'y' of type bfloat16; ",
    ),
]


@pytest.mark.parametrize(("where", "what", "said"), AT_WORKER)
def test_a_backend_s_faults_at_the_worker_are_its_own(
    register: Register, where: str, what: Callable[..., Any], said: str
) -> None:
    register(registry.BACKENDS, fault(where, what))
    with pytest.raises(WorkerError) as caught:
        product("faulty")
    assert f"backend 'faulty' (test:Faulty, from test 1.0) failed at this worker: {said}" in str(caught.value)
    assert "0.73" not in str(caught.value)


def test_infinity_that_comes_of_the_input_is_not_the_backend_s_fault() -> None:
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.weight, 10.0)
    model = ciphertune.outsource(nn.Sequential(layer), "clear", "all", plugins=PluginManager())
    assert not torch.isfinite(model(torch.full((1, 4), 3e38))).all()
    ciphertune.session_of(model).close()


@dataclasses.dataclass(frozen=True)
class Empty:
    """No options."""


class Wired(Link):
    name = "wire"

    def __init__(self, submit: Callable[[Any], Any]) -> None:
        self._submit = submit

    def submit(self, request: Any) -> Any:
        return self._submit(request)

    def close(self) -> None:
        """Nothing is open."""


def resolved(value: Any) -> Callable[[Any], Future[Any]]:
    future: Future[Any] = Future()
    future.set_result(value)
    return lambda request: future


CONNECTED = [
    (fail, "transport 'wire' (test:Wire, from test 1.0) failed in 'connect': KeyError"),
    (lambda *_: None, "'connect' gave a NoneType, and must give a sequence of ciphertune.transport.Link"),
    (lambda *_: ["10.0.0.5:5555"], "'connect' gave a list, and must give a sequence of ciphertune.transport.Link"),
    (lambda *_: [Wired(fail)], "wire: the transport failed (test_broken.Wired): KeyError at plugins/test_broken.py"),
    (lambda *_: [Wired(lambda request: request)], "'submit' returned a Message and no Future"),
    (lambda *_: [Wired(resolved(b"reply"))], "a bytes came in place of a Message"),
]


@pytest.mark.parametrize(("connect", "said"), CONNECTED)
def test_a_transport_s_faults_are_not_the_network_s(register: Register, connect: Callable[..., Any], said: str) -> None:
    wire = type("Wire", (Local,), {"name": "wire", "connect": connect})
    register(registry.TRANSPORTS, wire)
    with pytest.raises(PluginError) as caught:
        product(transport="wire")
    assert said in str(caught.value).replace("tests.plugins.", "")
    assert "fault of the plugin" in str(caught.value)
    assert "0.73" not in str(caught.value)


WRAPPED = [
    (fail, "failed in 'connect': KeyError"),
    (lambda *_: None, "'connect' gave a list, and must give a sequence of ciphertune.transport.Link"),
    (lambda *_: Wired(lambda request: None), "'submit' returned a NoneType and no Future"),
]


@pytest.mark.parametrize(("wrap", "said"), WRAPPED)
def test_faults_of_one_around_another_name_both(register: Register, wrap: Callable[..., Any], said: str) -> None:
    register(
        registry.TRANSPORTS, type("Outer", (WrappingTransport,), {"name": "outer", "Options": Empty, "wrap": wrap})
    )
    with pytest.raises(PluginError) as caught:
        product(transport="outer::local")
    assert said in str(caught.value)
    assert "fault of the plugin" in str(caught.value)
    if "'connect'" in said:
        assert "'outer::local' (test:Outer, from test 1.0 around ciphertune_local:" in str(caught.value)


def test_what_the_network_does_is_the_network_s(register: Register) -> None:
    def refused(*_: Any) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    register(registry.TRANSPORTS, type("Wire", (Local,), {"name": "wire", "connect": refused}))
    with pytest.raises(TransportError, match="'wire' .* failed in 'connect': .* Connection refused"):
        product(transport="wire")
    register(registry.TRANSPORTS, type("Wire", (Local,), {"name": "wire", "connect": lambda *_: [Wired(refused)]}))
    with pytest.raises(TransportError, match="no answer within 0.2 s from wire .ConnectionRefusedError"):
        product(transport="wire", connect_timeout=0.2)


def test_a_connect_that_blocks_is_named(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    def connect(self: Any, endpoints: tuple[str, ...], worker: Any) -> Any:
        for _ in range(600):
            if caplog.records:
                break
            torch.randn(1000).sort()
        return Local.connect(self, endpoints, worker)

    register(registry.TRANSPORTS, type("Slow", (Local,), {"name": "slow", "connect": connect}))
    product(transport="slow", connect_timeout=0.01)
    assert "transport 'slow' (test:Slow, from test 1.0) has not opened its links after 0.01 s" in caplog.text


def test_options_that_refuse_a_value_say_why(register: Register) -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        size: int = 1

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("option size must be above 0")

    register(registry.BACKENDS, type("Sized", (Clear,), {"name": "sized", "Options": Options}))
    with pytest.raises(SelectionError, match="option size must be above 0"):
        product("sized", size=0)


# Commands.


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> LazyGroup:
    monkeypatch.delenv("CIPHERTUNE_PLUGINS", raising=False)
    manager = PluginManager()
    monkeypatch.setattr("ciphertune.plugins.manager.plugin_manager", lambda: manager)
    made = LazyGroup("ciphertune")
    made.manager = manager  # type: ignore[attr-defined]
    return made


def command(name: str) -> click.Command:
    return click.Command(name, callback=lambda: click.echo(name))


class Taking:
    @hookimpl
    def ciphertune_register_commands(self, cli: Any) -> None:
        cli.add_command(command("train"))


def test_a_command_s_name_is_taken_once(group: LazyGroup) -> None:
    group.manager.register(Taking(), "taking")  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match="'taking' failed .* the command 'train' is CipherTune's own"):
        assert group.list_commands(click.Context(group)).count("train") == 1
    group.add_command(command("mine"))
    with pytest.raises(PluginError, match="the command 'mine' is another plugin's"):
        group.add_command(command("mine"))


def test_a_command_that_fails_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def register_commands(cli: Any) -> None:
        cli.add_command(click.Command("break-it", callback=fail))

    class Breaking:
        ciphertune_register_commands = staticmethod(hookimpl(register_commands))

    register_commands.__name__ = "ciphertune_register_commands"
    manager = PluginManager()
    manager.register(Breaking(), "breaking")
    monkeypatch.setattr("ciphertune.plugins.manager.plugin_manager", lambda: manager)
    from ciphertune.cli import cli

    monkeypatch.setattr(cli, "_plugins_asked", False)
    monkeypatch.setattr(cli, "commands", {})
    with pytest.raises(SystemExit) as ended:
        main(["break-it"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "ciphertune: the command 'break-it', which a plugin added, failed: KeyError" in said
    assert said.count("\n") == 1
    monkeypatch.setenv("CIPHERTUNE_TRACE_PLUGINS", "1")
    with pytest.raises(KeyError):
        main(["break-it"])


COMMANDS = """
import click, dataclasses
from ciphertune.hookspecs import hookimpl

@dataclasses.dataclass(frozen=True)
class Options: level: int

def command(name): return click.Command(name, callback=lambda: click.echo("ran " + name), help="One more.")

@hookimpl
def ciphertune_register_commands(cli): cli.add_command(command("of-module"))

class Plain:
    @hookimpl
    def ciphertune_register_commands(self, cli): cli.add_command(command("of-class"))

class Optional:
    Options = Options
    @staticmethod
    @hookimpl
    def ciphertune_register_commands(cli): cli.add_command(command("of-options"))

class Bound:
    Options = Options
    def __init__(self, options): self.options = options
    @hookimpl
    def ciphertune_register_commands(self, cli): cli.add_command(command("bound"))
"""


def test_commands_run_however_the_hook_is_given(tmp_path: Path) -> None:
    points = "module = commands\nplain = commands:Plain\noptional = commands:Optional\nbound = commands:Bound"
    ship(tmp_path, "commands", f"[ciphertune.plugins]\n{points}\n", commands=COMMANDS)
    code = """
    import warnings
    warnings.simplefilter("error")
    from click.testing import CliRunner
    from ciphertune.cli import cli
    for name in ("of-module", "of-class", "of-options", "bound"):
        print(CliRunner().invoke(cli, [name]).output.splitlines()[-1])
    from ciphertune.cli.installed import rows
    print(*(row["note"] for row in rows("ciphertune.plugins") if "note" in row))
    """
    lines = child(textwrap.dedent(code), tmp_path, torch=False).splitlines()
    assert lines[:3] == ["ran of-module", "ran of-class", "ran of-options"]
    assert "No such command 'bound'" in lines[3]
    assert lines[4].startswith("its commands are added only where CIPHERTUNE_PLUGINS names it")
    lines = child(code, tmp_path, torch=False, CIPHERTUNE_PLUGINS="no:optional,bound?level=2").splitlines()
    assert lines[:2] == ["ran of-module", "ran of-class"]
    assert "No such command 'of-options'" in lines[2]
    assert lines[3] == "ran bound"
