"""Backends, transports and hook plugins, found by name through entry points and imported on first use.

A name belongs to one package. CipherTune's own names are its own; a name that two other packages register is refused
to whoever asks for it, and nothing else is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ciphertune._support.suggestions import closest
from ciphertune._support.version import __version__
from ciphertune.errors import CipherTuneError, PluginError, SelectionError
from ciphertune.plugins import checking
from ciphertune.plugins.groups import BACKENDS as BACKENDS, KINDS as KINDS, PLUGINS as PLUGINS, TRANSPORTS as TRANSPORTS

if TYPE_CHECKING:
    from ciphertune.backend import Backend
    from ciphertune.transport import Transport

_OWN = "ciphertune"
"""The distribution whose names no other may take."""


@dataclasses.dataclass(frozen=True)
class Registered:
    """One installed plugin, not yet imported.

    Attributes:
        name: entry-point name, the one used in a selection string.
        target: ``module:attribute`` it points to.
        distribution: name and version of the package that ships it.
        group: entry-point group; empty for one whose class is not checked.
        requires: versions of ciphertune that the package asks for, as ``>=0.1,<0.2``; empty for any.
        refused: why it is not loaded under this name; empty where it is.
    """

    name: str
    target: str
    distribution: str
    entry_point: metadata.EntryPoint = dataclasses.field(repr=False, compare=False)
    group: str = ""
    requires: str = ""
    refused: str = ""

    @property
    def title(self) -> str:
        """Kind, name, target and package, for messages."""
        return f"{KINDS.get(self.group, 'plugin')} {self.name!r} ({self.target}, from {self.distribution})"

    @property
    def mismatch(self) -> str:
        """In a sentence that its package asks for another version of ciphertune than is installed; else empty."""
        if _suits(self.requires):
            return ""
        package = self.distribution.partition(" ")[0]
        return (
            f"{self.distribution} is made for ciphertune{self.requires}, and {__version__} is installed: "
            f"pip install --upgrade {package}, or install the ciphertune that it asks for"
        )

    def load(self) -> Any:
        """Import the plugin and check that it is what its group wants.

        Raises:
            PluginError: its name is not its own, the import failed, or what came is none of its kind; other plugins
                are not affected.
        """
        if self.refused:
            raise PluginError(self.refused)
        try:
            plugin = self.entry_point.load()
        except (Exception, SystemExit) as error:
            if absent := missing_package(error, [self]):
                raise PluginError(f"{self.title} cannot be imported: {absent}{self._hint}") from error
            raise PluginError(
                f"{self.title} cannot be imported: {type(error).__name__}: {error}{self._hint}"
            ) from error
        if why := checking.unfit(self.group, self.name, plugin):
            raise PluginError(
                f"{self.title} cannot be used: {why}. Until its authors repair it, uninstall it: "
                f"pip uninstall {self.distribution.partition(' ')[0]}{self._hint}"
            )
        return plugin

    @property
    def _hint(self) -> str:
        return f". {self.mismatch}" if self.mismatch else ""


@functools.cache
def _found(group: str) -> tuple[Registered, ...]:
    """Every entry point of a group, by name; one that is seen twice with the same target counts once."""
    found: dict[tuple[str, str], Registered] = {}
    for entry_point in metadata.entry_points(group=group):
        dist = entry_point.dist
        package = f"{dist.name} {dist.version}" if dist else "unknown"
        row = Registered(
            entry_point.name, entry_point.value, package, entry_point, group, _requirement(dist) if dist else ""
        )
        found.setdefault((row.name, row.target), row)
    return tuple(found[key] for key in sorted(found))


def installed(group: str) -> dict[str, Registered]:
    """List what is installed in an entry-point group, by name; nothing is imported.

    A name that several packages register is there once, and is refused where it is loaded, unless one of them is
    CipherTune itself, whose it then is.
    """
    return {name: rows[0] for name, rows in _by_name(group).items()}


def displaced(group: str) -> tuple[Registered, ...]:
    """What is installed under a name that is another's or several packages', beside what ``installed`` lists."""
    return tuple(row for rows in _by_name(group).values() for row in rows[1:])


@functools.cache
def _by_name(group: str) -> dict[str, list[Registered]]:
    """Rows of each name, the one that has it first; those that may not be loaded say why."""
    names: dict[str, list[Registered]] = {}
    for row in _found(group):
        names.setdefault(row.name, []).append(row)
    return {name: _settled(rows) for name, rows in names.items()}


def _settled(rows: list[Registered]) -> list[Registered]:
    if len(rows) == 1:
        return rows
    own = [row for row in rows if _package(row) == _OWN]
    if own:
        return own[:1] + [
            dataclasses.replace(
                row,
                refused=f"{row.name!r} is the name of CipherTune's own {KINDS[row.group]}: the one of "
                f"{row.distribution} ({row.target}) is not used. Rename its entry point, or uninstall it: pip "
                f"uninstall {_package(row)}",
            )
            for row in rows
            if row not in own[:1]
        ]
    told = " and ".join(f"by {row.distribution} ({row.target})" for row in rows)
    refused = f"{rows[0].name!r} is registered {len(rows)} times in {rows[0].group}: {told}; uninstall all but one"
    return [dataclasses.replace(row, refused=refused) for row in rows]


def _package(row: Registered) -> str:
    return row.distribution.partition(" ")[0].lower().replace("_", "-")


def load(group: str, name: str) -> Any:
    """Import the class registered as ``name`` in ``group``.

    Of transports, ``outer::inner`` is the one that the first makes around the other.

    Raises:
        SelectionError: no plugin of that name is installed, or one wraps no other.
        PluginError: it is installed but cannot be used, as ``Registered.load``.
    """
    if group == TRANSPORTS and "::" in name:
        return _chained(name)
    rows = installed(group)
    if name not in rows:
        raise SelectionError(f"unknown {KINDS[group]} {name!r}; {closest(name, rows)}")
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


def own_names(group: str) -> frozenset[str]:
    """Names in an entry-point group that are CipherTune's own, and that no other package may take."""
    return frozenset(row.name for row in _found(group) if _package(row) == _OWN)


def missing_package(error: BaseException, rows: Sequence[Registered] = ()) -> str:
    """In a sentence, the package that an import failed for want of; empty for any other error.

    Args:
        error: as it was raised.
        rows: the plugins that it may have been raised in, whose packages say which versions they need.
    """
    module = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (module or "").partition(".")[0]
    if not package or package.startswith("ciphertune") or importlib.util.find_spec(package) is not None:
        return ""
    needed = [text for row in rows if row.entry_point.dist for text in _needs(row.entry_point.dist, package)]
    # Of a package whose modules have other names, the plugin's own requirements are the way to it.
    homes = [_package(row) for row in rows if _package(row) != _OWN]
    return f"the package {package!r} is not installed: pip install '{(needed or homes or [package])[0]}'"


def installed_as(group: str, name: str) -> list[Registered]:
    """What a name stands for: of a transport around another, both."""
    return [row for part in name.split("::") if (row := installed(group).get(part)) is not None]


def title(group: str, name: str) -> str:
    """A plugin in words, with the package that it is from where one is installed under this name.

    Of a transport around another, both packages: the fault may be in either.
    """
    rows = installed_as(group, name)
    if not rows:
        return f"{KINDS[group]} {name!r}"
    homes = " around ".join(f"{row.target}, from {row.distribution}" for row in rows)
    return f"{KINDS[group]} {name!r} ({homes})"


def get_backend(name: str) -> type[Backend]:
    """The backend class of a name, as a selection string begins with.

    Raises:
        SelectionError: no backend of that name is installed.
        PluginError: it is installed but cannot be imported, or is no backend.
    """
    found: type[Backend] = load(BACKENDS, name)
    return found


def get_transport(name: str) -> type[Transport]:
    """The transport class of a name, as stands after the ``+`` of a selection string.

    Raises:
        SelectionError: no transport of that name is installed.
        PluginError: it is installed but cannot be imported, or is no transport.
    """
    found: type[Transport] = load(TRANSPORTS, name)
    return found


def _requirement(dist: metadata.Distribution) -> str:
    """Versions of ciphertune that a distribution asks for; empty for any, and for CipherTune's own extras."""
    if dist.name.lower() == _OWN:
        return ""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for text in dist.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name.lower().replace("_", "-") == _OWN and applies and requirement.specifier:
            found.append(str(requirement.specifier))
    return ",".join(dict.fromkeys(found))


def _needs(dist: metadata.Distribution, package: str) -> list[str]:
    """What a distribution says that it needs of a package, as pip takes it."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for text in dist.requires or ():
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(text)
            if requirement.name.lower().replace("-", "_") == package.lower():
                found.append(f"{requirement.name}{requirement.specifier}")
    return found


def _suits(requires: str) -> bool:
    if not requires:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(requires).contains(__version__, prereleases=True)


def reason(error: BaseException) -> str:
    """What an error says, of whichever type: a stranger's plugin may raise anything."""
    return str(error) if isinstance(error, CipherTuneError) else f"{type(error).__name__}: {error}"
