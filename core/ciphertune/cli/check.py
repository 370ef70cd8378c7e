"""The command ``ciphertune check``: the conformance suite against an installed plugin, without a test file."""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ciphertune._support.builders import required
from ciphertune._support.options import build_options
from ciphertune._support.suggestions import closest
from ciphertune.cli.output import print_json
from ciphertune.cli.pairs import name_values
from ciphertune.errors import ConfigError, PluginError, SelectionError
from ciphertune.plugins import registry
from ciphertune.plugins.manager import options_of
from ciphertune.selection import SessionOptions, parse_use

_ATTRIBUTES = {
    "BackendSuite": "selection",
    "TransportSuite": "name",
    "WrappingSuite": "name",
    "PluginSuite": "use",
}
"""Of each suite the attribute that names the plugin."""
_GROUPS = {kind: group for group, kind in registry.KINDS.items()}


@click.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(sorted(_GROUPS)), help="Where plugins of several kinds have this name.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An attribute of the suite, as tolerance=0.01, address=ipc://{folder}/worker.",
)
@click.option("--only", metavar="EXPRESSION", help="Tests whose names match, as pytest's -k: 'zeros or scales'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(name: str, kind: str | None, settings: tuple[str, ...], only: str | None, as_json: bool) -> None:
    """Run the conformance suite of its kind against the installed plugin NAME, and report.

    NAME may carry options: 'mlwe?weight_bits=16', 'zmq?insecure=1', 'history?path=run.csv'. A transport that wraps
    others is named alone, as 'flaky', for the suite of such transports, and as 'flaky::zmq' for that of transports.
    Exit status 1 if a test fails.
    """
    if importlib.util.find_spec("pytest") is None:
        raise PluginError('the suites need pytest: pip install "ciphertune[testing]"')
    plain, options = _parsed(name)
    failed = False
    reports = []
    for group in _groups(plain, kind):
        row = registry.installed(group)[plain.partition("::")[0]]
        _refuse_options(group, name, registry.load(group, plain), options)
        about = {"kind": registry.KINDS[group], "name": plain, "package": row.distribution, "mismatch": row.mismatch}
        if not as_json:
            click.echo(
                f"{about['kind']} {name} of {row.distribution}" + (f"\n  {row.mismatch}" if row.mismatch else "")
            )
        results = []
        for result in run_suite(group, name, name_values(settings), only):
            results.append(result)
            if not as_json and result["outcome"] != "skipped":
                _show(result)
        counts = collections.Counter(result["outcome"] for result in results)
        failed = failed or counts["failed"] > 0 or not counts["passed"]
        reports.append({**about, "passes": counts["failed"] == 0 and counts["passed"] > 0, "results": results})
        if not as_json:
            _show_skipped(results)
            click.echo(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    if as_json:
        print_json(reports)
    if failed:
        raise click.exceptions.Exit(1)


def run_suite(
    group: str, use: str, settings: dict[str, str] | None = None, only: str | None = None
) -> Iterator[dict[str, Any]]:
    """Run a suite in a process of its own; a result for each test as it ends.

    Args:
        group: entry-point group of the plugin.
        use: its name, perhaps with options.
        settings: attributes of the suite.
        only: an expression over names of tests.

    Returns:
        For each test its name, case, what it is about, outcome (passed, failed, skipped), reason and seconds.

    Raises:
        ConfigError: the suite has no such attribute.
        PluginError: the process ended without a result for every test.
    """
    with tempfile.TemporaryDirectory(prefix="ciphertune-check-") as name:
        folder = Path(name)
        (folder / "test_plugin.py").write_text(_module(group, use, settings or {}), encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "ciphertune.testing.reporting"]
        command += ["-p", "ciphertune.testing.fixtures", "-p", "no:cacheprovider", f"--ciphertune-report={writer}"]
        command += ["-c", str(folder / "pytest.ini"), "--rootdir", name, *(("-k", only) if only else ())]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        with (
            (folder / "output").open("w+b") as output,
            subprocess.Popen(
                [*command, str(folder / "test_plugin.py")],
                env=environment,
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            os.close(writer)
            try:
                with os.fdopen(reader, encoding="utf-8") as lines:
                    for line in lines:
                        yield json.loads(line)
            except BaseException:
                process.kill()
                raise
            status = process.wait()
            # 0: all passed; 1: some did not.
            if status not in (0, 1):
                output.seek(0)
                told = output.read().decode(errors="replace").strip().splitlines()[-3:]
                ended = f"signal {-status}" if status < 0 else f"status {status}"
                raise PluginError(f"the suite of {use!r} ended with {ended}: {' '.join(told)}")


def _groups(name: str, kind: str | None) -> Sequence[str]:
    """Groups in which a plugin has this name."""
    wanted = registry.KINDS if kind is None else {_GROUPS[kind]: kind}
    outer, chain, _ = name.partition("::")
    if chain:
        wanted = {group: kind for group, kind in wanted.items() if group == registry.TRANSPORTS}
    found = [group for group in wanted if outer in registry.installed(group)]
    if not found:
        known = {each for group in wanted for each in registry.installed(group)}
        raise SelectionError(f"no plugin named {name!r} is installed; {closest(name, known)}")
    return found


def _parsed(use: str) -> tuple[str, dict[str, str]]:
    """The name, which may be of a transport around another, and the options."""
    outer, chain, rest = use.strip().partition("::")
    if not chain:
        return parse_use(use)
    inner, options = _parsed(rest)
    return f"{parse_use(outer)[0]}::{inner}", options


def _refuse_options(group: str, use: str, plugin: Any, options: Mapping[str, str]) -> None:
    """Raise ``SelectionError`` for options that the plugin does not take, once and before any test."""
    if group == registry.BACKENDS:
        cls = plugin.options_class(options)
    else:
        cls = options_of(plugin) if group == registry.PLUGINS else plugin.Options
    if cls is None and options:
        raise SelectionError(f"{use!r}: this plugin takes no options")
    missing = [] if cls is None else [f.name for f in dataclasses.fields(cls) if required(f) and f.name not in options]
    if missing:
        asked = "&".join(f"{name}=…" for name in missing)
        raise SelectionError(f"{use!r} needs options: ciphertune check '{use}{'&' if options else '?'}{asked}'")
    common = {field.name for field in dataclasses.fields(SessionOptions)}
    if cls is not None:
        build_options(cls, {option: text for option, text in options.items() if option not in common})


def _suite(group: str, name: str) -> str:
    """The suite for a plugin. Raises ``SelectionError`` for a transport that there is none for."""
    if group != registry.TRANSPORTS:
        return "BackendSuite" if group == registry.BACKENDS else "PluginSuite"
    from ciphertune.transport import WrappingTransport

    plugin = registry.load(group, name)
    if "::" not in name and issubclass(plugin, WrappingTransport):
        return "WrappingSuite"
    if plugin.ServeOptions is None:
        raise SelectionError(
            f"the suite of transports is for those that serve workers elsewhere, and {name!r} serves none"
        )
    return "TransportSuite"


def _module(group: str, use: str, settings: dict[str, str]) -> str:
    """A test module with the suite of a group."""
    from ciphertune import testing

    suite = _suite(group, _parsed(use)[0])
    attribute = _ATTRIBUTES[suite]
    annotated = [vars(base).get("__annotations__", ()) for base in getattr(testing, suite).__mro__]
    known = {name for names in annotated for name in names} - {attribute}
    values: dict[str, Any] = {attribute: use}
    if group == registry.TRANSPORTS:
        values[attribute], _, values["options"] = use.partition("?")
    for name, text in settings.items():
        if name not in known:
            raise ConfigError(f"{suite} has no attribute {name!r}; {closest(name, known)}")
        values[name] = _value(text)
    lines = [f"from ciphertune.testing import {suite}\n\n\nclass TestPlugin({suite}):"]
    return "\n".join([*lines, *(f"    {name} = {value!r}" for name, value in values.items())]) + "\n"


def _value(text: str) -> Any:
    """A number, tuple or truth value as Python writes it, or the text as it is."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _show(result: dict[str, Any]) -> None:
    case = f" ({result['case']})" if result["case"] else ""
    failed = result["outcome"] == "failed"
    word = click.style(f"{'FAILED' if failed else result['outcome']:<8}", fg="red" if failed else None, bold=failed)
    click.echo(f"  {word}{result['test']}{case}" + (f": {result['reason']}" if result["reason"] else ""))
    if failed and result["about"]:
        click.echo(f"          {result['about']}")


def _show_skipped(results: Sequence[dict[str, Any]]) -> None:
    """Tests that were left out: cases that were for the same reason share a line."""
    skipped = [result for result in results if result["outcome"] == "skipped"]
    cases = collections.Counter((result["test"], result["reason"]) for result in skipped)
    for (test, reason), count in cases.items():
        _show({"outcome": "skipped", "test": test, "case": f"{count} cases" * (count > 1), "reason": reason})
