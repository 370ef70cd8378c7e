"""The plugin manager: loads hook plugins by entry point and calls observers without letting them break a run.

``CIPHERTUNE_PLUGINS`` limits which plugins load: a comma-separated list of names, empty for none.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import pluggy

from ciphertune import hookspecs, registry
from ciphertune.errors import PluginError

hookimpl = pluggy.HookimplMarker("ciphertune")


class PluginManager:
    """Hook plugins of this process.

    Attributes:
        failed: names of plugins that could not be loaded, with the reason.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("ciphertune")
        self._manager.add_hookspecs(hookspecs)
        self.failed: dict[str, str] = {}

    def load_installed(self) -> None:
        """Load every installed plugin that ``CIPHERTUNE_PLUGINS`` allows; a failure is kept in ``failed``."""
        allowed = os.environ.get("CIPHERTUNE_PLUGINS")
        names = None if allowed is None else {name.strip() for name in allowed.split(",")}
        for name, row in registry.installed(registry.PLUGINS).items():
            if names is not None and name not in names:
                continue
            try:
                self.register(row.load(), name)
            except PluginError as error:
                self.failed[name] = str(error)
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def register(self, plugin: Any, name: str | None = None) -> None:
        """Add a plugin object.

        Raises:
            PluginError: it implements a hook that does not exist, or is registered already.
        """
        known = self._manager.is_registered(plugin)
        try:
            registered = self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if not known and self._manager.get_name(plugin) is not None:
                self._manager.unregister(plugin)
            raise PluginError(f"plugin {name or plugin!r}: {error}") from error
        if registered is None:
            raise PluginError(f"plugin {name!r} is blocked")

    def unregister(self, plugin: Any) -> None:
        """Remove a plugin object."""
        self._manager.unregister(plugin)

    def names(self) -> list[str]:
        """Names of the registered plugins."""
        return sorted(name for name, plugin in self._manager.list_name_plugin() if plugin is not None)

    def gate(self, hook: str, **arguments: Any) -> Any:
        """Call a hook whose errors and result count."""
        return getattr(self._manager.hook, hook)(**arguments)

    def observe(self, hook: str, **arguments: Any) -> None:
        """Call a hook one plugin at a time; one that raises is named in a warning and stops nothing."""
        caller = getattr(self._manager.hook, hook)
        for implementation in reversed(caller.get_hookimpls()):
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:
                warnings.warn(
                    f"plugin {implementation.plugin_name!r} failed in {hook}: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )


@functools.cache
def plugin_manager() -> PluginManager:
    """The process's plugin manager, with the installed plugins loaded on first use."""
    manager = PluginManager()
    manager.load_installed()
    return manager
