"""The commands ``ciphertune backends``, ``transports`` and ``plugins``: lists of what is installed."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import click

from ciphertune._support.builders import required
from ciphertune.cli.output import print_entries, print_json, print_table
from ciphertune.errors import CipherTuneError
from ciphertune.plugins import registry
from ciphertune.plugins.manager import options_of

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _rows(group: str) -> list[dict[str, Any]]:
    rows = []
    for row in registry.installed(group).values():
        entry: dict[str, Any] = {"name": row.name, "package": row.distribution, "target": row.target, "error": None}
        try:
            entry |= _describe(group, row.load())
        except CipherTuneError as error:
            entry["error"] = str(error)
        except Exception as error:
            # A stranger's plugin may raise anything; the others are listed all the same.
            entry["error"] = f"{type(error).__name__}: {error}"
        rows.append(entry)
    return rows


def _plugin_rows() -> list[dict[str, Any]]:
    """Rows as of ``_rows``, with whether a plugin manager takes each; ``CIPHERTUNE_PLUGINS`` may leave some out."""
    from ciphertune.plugins.manager import PluginManager

    manager = PluginManager()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table says it
        manager.load_installed()
    rows = _rows(registry.PLUGINS)
    for row in rows:
        row["error"] = row["error"] or manager.failed.get(row["name"])
        row["active"] = row["name"] in manager.names()
    return rows


def _describe(group: str, plugin: Any) -> dict[str, Any]:
    if group == registry.PLUGINS:
        hooks = sorted(name for name in dir(plugin) if name.startswith("ciphertune_"))
        chosen = options_of(plugin)
        return {"hooks": hooks, "always": chosen is None, "options": {} if chosen is None else _defaults(chosen)}
    options = _defaults(plugin.Options)
    if group == registry.TRANSPORTS:
        return {"remote": plugin.remote, "options": options}
    security = plugin().security
    return {
        "encrypted": security.encrypted,
        "security_bits": security.bits,
        "security_level": security.level,
        "security": security.summary,
        "assumption": security.assumption,
        "licence": plugin.licence,
        "problem": plugin.problem(),
        "options": options,
    }


def _defaults(options: type) -> dict[str, Any]:
    """Option names and defaults; an ellipsis for what must be given."""
    return {field.name: "…" if required(field) else field.default for field in dataclasses.fields(options)}


def _options(row: dict[str, Any]) -> str:
    options = row.get("options", {})
    return " ".join(f"{name}={'none' if value is None else value}" for name, value in options.items()) or "none"


@click.command()
@_json_option
def backends(as_json: bool) -> None:
    """List installed backends, what each protects, and its options with their defaults."""
    rows = _rows(registry.BACKENDS)
    if as_json:
        print_json(rows)
        return
    entries = []
    for row in rows:
        if row["error"]:
            entries.append((row["name"], [f"cannot be loaded: {row['error']}", f"package: {row['package']}"]))
            continue
        licence = f"licence: {row['licence']}" if row["licence"] else ""
        problem = f"cannot run here: {row['problem']}" if row["problem"] else ""
        security = f"security: {row['security_level']}", row["security"], problem, licence
        entries.append((row["name"], [*security, f"options: {_options(row)}", f"package: {row['package']}"]))
    print_entries(entries)


@click.command()
@_json_option
def transports(as_json: bool) -> None:
    """List installed transports and their options."""
    rows = _rows(registry.TRANSPORTS)
    if as_json:
        print_json(rows)
        return
    table = [
        (
            row["name"],
            row["error"] or ("other processes" if row["remote"] else "this process"),
            _options(row),
            row["package"],
        )
        for row in rows
    ]
    print_table("Transports", ["name", "workers are in", "options", "package"], table)


@click.command()
@_json_option
def plugins(as_json: bool) -> None:
    """List installed hook plugins, the options of those that are active where named, and the hooks they use."""
    rows = _plugin_rows()
    if as_json:
        print_json(rows)
        return
    entries = []
    for row in rows:
        hooks = ", ".join(hook.removeprefix("ciphertune_") for hook in row.get("hooks", ()))
        lines = [_state(row), row["error"] or "", f"options: {_options(row)}" if row.get("options") else ""]
        lines += [f"hooks: {hooks}" if hooks else "", f"package: {row['package']}"]
        entries.append((row["name"], lines))
    print_entries(entries)


def _state(row: dict[str, Any]) -> str:
    if row["active"]:
        return "active"
    if row["error"]:
        return "cannot be loaded"
    return "off (CIPHERTUNE_PLUGINS)" if row["always"] else "where named"
