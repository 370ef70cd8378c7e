"""The plugin manager: finds hook plugins by entry point and calls observers without letting them break a run.

An entry point in ``ciphertune.plugins`` is a module, an object or a class of hooks, which is always active, or a class
with ``Options`` (a frozen dataclass), which is active where it is named: ``history?path=run.csv``. Fields of type
``Path`` are paths: those in a configuration file are relative to it. Commands are added by either; a class with
``Options`` adds them by a static method or a class method, since no options were given yet.

``CIPHERTUNE_PLUGINS`` decides instead what is active: a comma-separated list of such strings (a comma in an option is
written %2C), empty for none. ``no:NAME`` in it switches one off, and leaves what is always active as it is otherwise.
``CIPHERTUNE_TRACE_PLUGINS=1`` prints every hook call to standard error.

The plugin that was registered last is called first. ``hookimpl(tryfirst=True)`` puts an implementation before all
others, ``hookimpl(trylast=True)`` after them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pluggy

from ciphertune import hookspecs
from ciphertune._support.options import build_options
from ciphertune._support.suggestions import closest
from ciphertune.errors import CipherTuneError, PluginError, SelectionError
from ciphertune.plugins import checking, registry
from ciphertune.plugins.trace import trace, tracing
from ciphertune.selection import parse_use

_VARIABLE = "CIPHERTUNE_PLUGINS"
_OFF = "no:"
GATES = ("ciphertune_before_request", "ciphertune_select_layers")
"""Hooks whose errors and results count."""


class PluginManager:
    """Hook plugins of this process.

    Attributes:
        failed: what could not be made active, by name, with the reason.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("ciphertune")
        self._manager.add_hookspecs(hookspecs)
        self.failed: dict[str, str] = {}
        self._classes: dict[str, type] = {}  # active where they are named, by name
        self._used: dict[str, tuple[Any, Any]] = {}  # plugins that `use` made and their options, by name
        self._raised: collections.Counter[tuple[str, str]] = collections.Counter()
        self._counting = threading.Lock()
        self._tracing = tracing()

    def load_installed(self) -> None:
        """Activate what is always active, or what ``CIPHERTUNE_PLUGINS`` says; failures are warned of and kept.

        A name that several packages claim is kept among the failures and not warned of: nobody asked for it.
        """
        text = os.environ.get(_VARIABLE)
        uses = [part for part in (part.strip() for part in (text or "").split(",")) if part]
        off = {use.removeprefix(_OFF) for use in uses if use.startswith(_OFF)}
        rows = registry.installed(registry.PLUGINS)
        for name in sorted(off - rows.keys()):
            with self._reported(_OFF + name):
                raise SelectionError(f"{_VARIABLE} switches off {name!r}, which is not there; {closest(name, rows)}")
        if text is None or off:
            for name, row in rows.items():
                if row.refused:
                    self.failed[name] = row.refused
                elif name not in off:
                    with self._reported(name):
                        self._activate(name, row.load())
        for use in uses:
            if not use.startswith(_OFF):
                with self._reported(use.partition("?")[0]):
                    self.use(use)

    def _activate(self, name: str, plugin: Any) -> None:
        """Register what is always active; keep a class that is active where it is named, for its commands."""
        if options_of(plugin) is not None:
            self._classes[name] = plugin
        else:
            self.register(_made_alone(name, plugin), name)

    def use(self, text: str) -> Any:
        """Make a plugin active.

        Args:
            text: ``name[?option=value&…]``. A class may be used more than once, with other options each time.

        Returns:
            The plugin. ``unregister`` removes and closes it.

        Raises:
            SelectionError: no plugin has this name, or an option is unknown, missing or wrong.
            PluginError: it cannot be imported or set up, a package that it needs is missing, or the same use of it is
                active already.
        """
        name, values = parse_use(text)
        plugin = registry.load(registry.PLUGINS, name)
        if options_of(plugin) is None:
            if values:
                raise SelectionError(f"plugin {name!r} takes no options")
            for known in self._manager.get_plugins():
                if known is plugin or (isinstance(plugin, type) and type(known) is plugin):
                    return known
            made = _made_alone(name, plugin)
            self.register(made, name)
            return made
        options = _read_options(name, plugin, values)
        if any(type(other) is plugin and same == options for other, same in self._used.values()):
            raise PluginError(f"plugin {name!r} is in use with these options already")
        made = _set_up(name, plugin, options)
        try:
            number = itertools.count(2)
            free = name
            while free in self.names():
                free = f"{name}-{next(number)}"
            self.register(made, free)
        except BaseException:
            _close(made)
            raise
        self._used[free] = made, options
        return made

    @contextlib.contextmanager
    def using(self, *texts: str) -> Iterator[list[Any]]:
        """Plugins that are active within a ``with`` block; arguments and errors as for ``use``."""
        with contextlib.ExitStack() as stack:
            plugins = []
            for text in texts:
                before = self.names()
                plugins.append(self.use(text))
                if self.names() != before:
                    stack.callback(self.unregister, plugins[-1])
            yield plugins

    def register(self, plugin: Any, name: str | None = None) -> None:
        """Add a plugin object.

        Raises:
            PluginError: it implements a hook that does not exist or in a form that would never run, is registered
                already, or is a class to be used with options.
        """
        if isinstance(plugin, type) and hasattr(plugin, "Options"):
            raise PluginError(f"{plugin.__name__} is a class: register what it makes, or name it with 'use'")
        if fault := checking.hooks_fault(plugin):
            raise PluginError(f"plugin {name or plugin!r}: {fault}")
        known = self._manager.is_registered(plugin)
        try:
            registered = self._manager.register(plugin, name=name)
            self._manager.check_pending()
            self._check_callable(plugin)
        except (pluggy.PluginValidationError, ValueError) as error:
            if not known and self._manager.get_name(plugin) is not None:
                self._manager.unregister(plugin)
            raise PluginError(f"plugin {name or plugin!r}: {error}") from error
        if registered is None:
            raise PluginError(f"plugin {name!r} is blocked")

    def unregister(self, plugin: Any) -> None:
        """Remove a plugin object; one that ``use`` made is closed."""
        name = self._manager.get_name(plugin)
        self._manager.unregister(plugin)
        if name is None:
            return
        with self._counting:
            for key in [key for key in self._raised if key[0] == name]:
                del self._raised[key]
        if self._used.pop(name, None) is not None:
            try:
                _close(plugin)
            except Exception as error:
                warnings.warn(
                    f"plugin {name!r} failed to close: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2
                )

    def names(self) -> list[str]:
        """Names of the registered plugins; one that is in use for a second time is called ``name-2``."""
        return sorted(name for name, plugin in self._manager.list_name_plugin() if plugin is not None)

    def add_commands(self, cli: Any) -> None:
        """Let plugins add their commands to a ``click.Group``: the active ones, and classes that are active if named.

        One that fails is named in a warning.
        """
        self.observe("ciphertune_register_commands", cli=cli)
        made = {type(plugin) for plugin, _ in self._used.values()}
        for name, plugin in self._classes.items():
            adds = adds_commands(plugin)
            if adds is None or plugin in made:
                continue
            try:
                adds(**{each: cli for each in inspect.signature(adds).parameters if each == "cli"})
            except Exception as error:
                text = f"plugin {name!r} failed in ciphertune_register_commands: {registry.reason(error)}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def gate(self, hook: str, **arguments: Any) -> Any:
        """Call a hook whose errors and result count."""
        caller = getattr(self._manager.hook, hook)
        if self._tracing:
            _trace(caller, arguments)
        return caller(**arguments)

    def observe(self, hook: str, **arguments: Any) -> None:
        """Call a hook one plugin at a time; one that raises is named in a warning and stops nothing.

        A plugin that keeps failing in a hook is warned of at the first, tenth, hundredth … time. What is not an
        ``Exception``, such as KeyboardInterrupt, passes.
        """
        caller = getattr(self._manager.hook, hook)
        if self._tracing:
            _trace(caller, arguments)
        said = []
        for implementation in reversed(caller.get_hookimpls()):
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:
                name = implementation.plugin_name
                with self._counting:
                    self._raised[name, hook] += 1
                    times = self._raised[name, hook]
                if str(times).strip("0") == "1":
                    count = f" ({times} times so far)" if times > 1 else ""
                    said.append(f"plugin {name!r} failed in {hook}{count}: {type(error).__name__}: {error}")
        # Last, because a warning may be an error here, and every plugin is to be called.
        for line in said:
            warnings.warn(line, RuntimeWarning, stacklevel=2)

    def _check_callable(self, plugin: Any) -> None:
        """Refuse an observer that gives a generator or a coroutine: called directly, it would never run."""
        for caller in self._manager.get_hookcallers(plugin) or []:
            for implementation in caller.get_hookimpls():
                wrapper = implementation.wrapper or implementation.hookwrapper
                function = implementation.function
                if implementation.plugin is plugin and (
                    (wrapper and caller.name not in GATES)
                    or inspect.iscoroutinefunction(function)
                    or (inspect.isgeneratorfunction(function) and not wrapper)
                ):
                    raise ValueError(f"{caller.name} must be an ordinary function, not a wrapper or a coroutine")

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        try:
            yield
        except CipherTuneError as error:
            self.failed[name] = str(error)
            warnings.warn(str(error), RuntimeWarning, stacklevel=4)


def _trace(caller: pluggy.HookCaller, arguments: Mapping[str, Any]) -> None:
    trace(caller.name, [each.plugin_name for each in reversed(caller.get_hookimpls())], arguments)


def anchored(text: str, folder: Path) -> str:
    """Take the relative paths in a use of a plugin from ``folder``; errors as for ``PluginManager.use``."""
    name, values = parse_use(text)
    plugin = registry.load(registry.PLUGINS, name)
    if options_of(plugin) is None:
        return text
    options = _read_options(name, plugin, values)
    for field in dataclasses.fields(options):
        if isinstance(path := getattr(options, field.name), Path):
            values[field.name] = str(folder / path)
    return f"{name}?{urlencode(values)}" if values else name


def options_of(plugin: Any) -> type | None:
    """The options dataclass of a plugin class; None for what is always active: all but classes that have one."""
    found: type | None = getattr(plugin, "Options", None) if isinstance(plugin, type) else None
    return found


def adds_commands(plugin: Any) -> Callable[..., Any] | None:
    """The hook by which a class that is active where it is named adds commands; None where it cannot without options.

    It can by a static method or a class method.
    """
    hook = "ciphertune_register_commands"
    if not isinstance(inspect.getattr_static(plugin, hook, None), (staticmethod, classmethod)):
        return None
    found: Callable[..., Any] = getattr(plugin, hook)
    return found


def _made_alone(name: str, plugin: Any) -> Any:
    """A module or object as it is, an object of a class without options."""
    return _set_up(name, plugin) if isinstance(plugin, type) else plugin


def _read_options(name: str, plugin: type, values: Mapping[str, Any]) -> Any:
    cls = options_of(plugin)
    assert cls is not None
    try:
        return build_options(cls, values)
    except SelectionError as error:
        raise SelectionError(f"plugin {name!r}: {error}") from error


def _set_up(name: str, plugin: Callable[..., Any], *options: Any) -> Any:
    try:
        made = plugin(*options)
    except CipherTuneError as error:
        raise type(error)(f"plugin {name!r}: {error}") from error
    except Exception as error:
        raise PluginError(f"plugin {name!r} cannot be set up: {type(error).__name__}: {error}") from error
    return made


def _close(plugin: Any) -> None:
    close = getattr(plugin, "close", None)
    if close is not None:
        close()


@functools.cache
def plugin_manager() -> PluginManager:
    """The process's plugin manager, with the installed plugins loaded on first use."""
    manager = PluginManager()
    manager.load_installed()
    return manager
