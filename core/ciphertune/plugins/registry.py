"""Backends and transports, found by name through entry points and imported on first use."""

from __future__ import annotations

import dataclasses
import functools
from importlib import metadata
from typing import Any

from ciphertune._support.suggestions import closest
from ciphertune.errors import PluginError, SelectionError

BACKENDS = "ciphertune.backends"
TRANSPORTS = "ciphertune.transports"
PLUGINS = "ciphertune.plugins"


@dataclasses.dataclass(frozen=True)
class Registered:
    """One installed plugin, not yet imported.

    Attributes:
        name: entry-point name, the one used in a selection string.
        target: ``module:attribute`` it points to.
        distribution: name and version of the package that ships it.
    """

    name: str
    target: str
    distribution: str
    entry_point: metadata.EntryPoint = dataclasses.field(repr=False, compare=False)

    def load(self) -> Any:
        """Import the plugin.

        Raises:
            PluginError: the import failed; other plugins are not affected.
        """
        try:
            return self.entry_point.load()
        except Exception as error:
            raise PluginError(
                f"plugin {self.name!r} ({self.target}, from {self.distribution}) cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error


@functools.cache
def installed(group: str) -> dict[str, Registered]:
    """List what is installed in an entry-point group, by name; nothing is imported.

    Raises:
        PluginError: two distributions register the same name.
    """
    found: dict[str, Registered] = {}
    for entry_point in metadata.entry_points(group=group):
        dist = entry_point.dist
        row = Registered(
            entry_point.name, entry_point.value, f"{dist.name} {dist.version}" if dist else "unknown", entry_point
        )
        other = found.get(row.name)
        if other is not None and other.target != row.target:
            raise PluginError(
                f"{row.name!r} is registered twice in {group}: by {other.distribution} ({other.target}) "
                f"and by {row.distribution} ({row.target}); uninstall one of them"
            )
        found[row.name] = row
    return dict(sorted(found.items()))


def load(group: str, name: str) -> Any:
    """Import the class registered as ``name`` in ``group``.

    Of transports, ``outer::inner`` is the one that the first makes around the other.

    Raises:
        SelectionError: no plugin of that name is installed, or one wraps no other.
        PluginError: it is installed but cannot be imported.
    """
    if group == TRANSPORTS and "::" in name:
        return _chained(name)
    rows = installed(group)
    if name not in rows:
        kind = group.rsplit(".", 1)[-1].removesuffix("s")
        raise SelectionError(f"unknown {kind} {name!r}; {closest(name, rows)}")
    return rows[name].load()


def _chained(name: str) -> Any:
    """The transport class for a chain of names, as ``flaky::zmq``."""
    from ciphertune.transport import CHAIN, WrappingTransport

    outer, _, inner = name.partition(CHAIN)
    wrapping = load(TRANSPORTS, outer)
    if not issubclass(wrapping, WrappingTransport):
        raise SelectionError(
            f"the transport {outer!r} wraps no other: write {inner!r} or {outer!r} instead of {name!r}"
        )
    return wrapping.around(load(TRANSPORTS, inner))
