"""What is installed: a row for every backend, transport and hook plugin, with its state, as plain data."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

from ciphertune._support.builders import required
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager, adds_commands, options_of

if TYPE_CHECKING:
    from ciphertune.backend import Backend
    from ciphertune.client.session import Checked

Row = dict[str, Any]

ANSWERS: dict[str, str] = {
    "before decryption": "checked exactly, before they are decrypted",
    "after decryption": "checked once they are decrypted, within the error that the backend declares",
    "no": "not checked: a worker can answer anything, and nothing will tell",
}
"""What the values of ``checked`` mean."""
REFUSED = "refused"
"""The state of what cannot be used, whatever kind it is of; ``reason`` says why."""


def rows(group: str) -> list[Row]:
    """A row for everything in an entry-point group, by name.

    One that may not have its name comes after the one that has it. Keys of every row: kind, name, package, target,
    requires, mismatch, interface, state, reason, options.
    """
    manager = _active() if group == registry.PLUGINS else None
    found = [_row(row, manager) for row in (*registry.installed(group).values(), *registry.displaced(group))]
    return sorted(found, key=lambda row: str(row["name"]))


def everything() -> list[Row]:
    """Rows of all groups: backends, transports, hook plugins."""
    return [row for group in registry.KINDS for row in rows(group)]


def options_with_defaults(options: type) -> dict[str, Row]:
    """Options by name: whether each is required, and the default of one that is not."""
    found: dict[str, Row] = {}
    for field in dataclasses.fields(options):
        if required(field):
            found[field.name] = {"required": True}
        else:
            made = field.default_factory
            default = made() if made is not dataclasses.MISSING else field.default
            found[field.name] = {"required": False, "default": default}
    return found


def _row(found: registry.Registered, manager: PluginManager | None) -> Row:
    row: Row = {
        "kind": registry.KINDS.get(found.group, "plugin"),
        "name": found.name,
        "package": found.distribution,
        "target": found.target,
        "requires": found.requires or None,
        "mismatch": found.mismatch or None,
        "interface": None,
        "state": REFUSED,
        "reason": None,
        "options": {},
    }
    try:
        plugin = found.load()
        row["interface"] = getattr(plugin, "interface", None)
        row |= _described(found, plugin) if manager is None else _described_hooks(found, plugin, manager)
    except (Exception, SystemExit) as error:
        # A stranger's plugin may raise anything; the others are listed all the same.
        row["reason"] = registry.reason(error)
    return row


def _described(found: registry.Registered, plugin: Any) -> Row:
    row: Row = {"options": options_with_defaults(plugin.Options)}
    if found.group == registry.BACKENDS:
        row |= {"licence": plugin.licence, "problem": plugin.problem()}
    if found.group == registry.TRANSPORTS:
        from ciphertune.transport import WrappingTransport

        serving = plugin.ServeOptions
        worker = None if serving is None else options_with_defaults(serving)
        remote = plugin.remote if isinstance(plugin.remote, bool) else None  # else of each instance
        row["wraps"] = issubclass(plugin, WrappingTransport)
        return row | {"state": "usable", "remote": remote, "worker_options": worker}
    if any(option["required"] for option in row["options"].values()):
        unknown = {"encrypted": None, "security_level": "depends on its options", "checked": None}
        return row | {"state": "usable", **unknown}
    from ciphertune.client.choice import security_of

    backend = plugin()
    security = security_of(backend)
    return row | {
        "state": "usable",
        "checked": _checked(backend),
        "encrypted": security.encrypted,
        "security_bits": security.bits,
        "security_level": security.level,
        "security": security.summary,
        "assumption": security.assumption,
    }


def _checked(backend: Backend) -> Checked:
    """How a session holds answers of workers elsewhere against what was asked for, as ``Session.checked`` says it."""
    from ciphertune.backend import DIRECTIONS, LinearMap
    from ciphertune.client.noise_checks import checkable

    if backend.checks_answers:
        return "before decryption"
    some = {direction: LinearMap("a layer", direction, 64, 64, 1.0) for direction in DIRECTIONS}
    return "after decryption" if checkable(backend, some) else "no"


def _described_hooks(found: registry.Registered, plugin: Any, manager: PluginManager) -> Row:
    options = options_of(plugin)
    hooks = sorted(name for name in dir(plugin) if name.startswith("ciphertune_"))
    row: Row = {"hooks": hooks, "always": options is None}
    row["options"] = {} if options is None else options_with_defaults(options)
    row["active"] = found.name in manager.names()
    row["reason"] = manager.failed.get(found.name)
    if row["active"]:
        row["state"] = "active"
    elif row["reason"]:
        row["state"] = REFUSED
    else:
        row["state"] = "off (CIPHERTUNE_PLUGINS)" if row["always"] else "where named"
    if options is not None and "ciphertune_register_commands" in hooks and adds_commands(plugin) is None:
        row["note"] = (
            "its commands are added only where CIPHERTUNE_PLUGINS names it, as 'ciphertune_register_commands' is "
            "neither a static method nor a class method"
        )
    return row


def _active() -> PluginManager:
    """A manager as a program would have it now; ``CIPHERTUNE_PLUGINS`` may leave some out."""
    manager = PluginManager()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the list says it
        manager.load_installed()
    return manager
