"""The commands ``ciphertune backends``, ``transports`` and ``plugins``: lists of what is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from ciphertune.cli.installed import ANSWERS, REFUSED, Row, everything, options_with_defaults, rows
from ciphertune.cli.output import print_entries, print_json
from ciphertune.plugins import registry
from ciphertune.selection import SessionOptions

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@_json_option
def backends(as_json: bool) -> None:
    """List installed backends, what each protects, and its options with their defaults."""
    found = rows(registry.BACKENDS)
    if as_json:
        print_json(found)
        return
    print_entries([(row["name"], _lines(row, _backend)) for row in found])


@click.command()
@_json_option
def transports(as_json: bool) -> None:
    """List installed transports, their options, and those that every selection string takes."""
    found = rows(registry.TRANSPORTS)
    if as_json:
        print_json(found)
        return
    common = ("in every selection string, over any transport", [f"options: {_options(_common())}"])
    print_entries([*((row["name"], _lines(row, _transport)) for row in found), common])


@click.command()
@_json_option
def plugins(as_json: bool) -> None:
    """List everything that is installed: backends, transports, hook plugins, with package, versions and state."""
    found = everything()
    if as_json:
        print_json(found)
        return
    print_entries([(f"{row['kind']} {row['name']}", _lines(row, _PARTS[row["kind"]], row["state"])) for row in found])


def _lines(row: Row, described: Callable[[Row], list[str]], state: str = "") -> list[str]:
    """Lines about a row; the state is left out where it goes without saying."""
    interface = f"interface {row['interface']}" if row["interface"] is not None else "interface not stated"
    package = f"package: {row['package']} ({interface})"
    if row["state"] == REFUSED:
        return [f"{REFUSED}: {row['reason']}", row["mismatch"] or "", package]
    return [state, *described(row), row["reason"] or "", row["mismatch"] or "", package]


def _backend(row: Row) -> list[str]:
    licence = f"licence: {row['licence']}" if row.get("licence") else ""
    security = [f"security: {row['security_level']}", row.get("security", ""), licence]
    problem = f"cannot run here: {row['problem']}" if row.get("problem") else ""
    answers = "" if row.get("checked") is None else f"answers of workers elsewhere: {ANSWERS[row['checked']]}"
    return [*security, answers, problem, f"options: {_options(row['options'])}"]


def _transport(row: Row) -> list[str]:
    places = {True: "in other processes", False: "in this process", None: "where its options say"}
    where = "around another transport" if row["wraps"] else f"workers are {places[row['remote']]}"
    worker = row["worker_options"]
    served = "" if worker is None else f"options of its workers: {_options(worker)}"
    return [where, f"options: {_options(row['options'])}", served]


def _hooks(row: Row) -> list[str]:
    options = f"options: {_options(row['options'])}" if row["options"] else ""
    hooks = ", ".join(hook.removeprefix("ciphertune_") for hook in row["hooks"])
    return [options, f"hooks: {hooks}", row.get("note", "")]


_PARTS: Mapping[str, Callable[[Row], list[str]]] = {"backend": _backend, "transport": _transport, "plugin": _hooks}


def _common() -> dict[str, Row]:
    return options_with_defaults(SessionOptions)


def _options(options: Mapping[str, Row]) -> str:
    """Options as text: names with defaults, an ellipsis for what must be given."""

    def value(option: Mapping[str, Any]) -> object:
        if option["required"]:
            return "…"
        return "none" if option["default"] is None else option["default"]

    return " ".join(f"{name}={value(option)}" for name, option in options.items()) or "none"
