"""What an entry point must point to, checked when it is loaded: why it is not that, in words for a user."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
from typing import Any

from ciphertune import hookspecs
from ciphertune._support.builders import unreadable
from ciphertune.plugins import groups
from ciphertune.selection import SessionOptions

HOOKS = tuple(sorted(name for name in vars(hookspecs) if name.startswith("ciphertune_")))
"""Names of all hooks."""
_MARK = "ciphertune_impl"
"""The attribute by which pluggy knows an implementation."""


def unfit(group: str, name: str, plugin: Any) -> str | None:
    """Why a plugin is not one of its group, None where it is.

    Args:
        group: entry-point group; nothing is checked for any other.
        name: of the entry point.
        plugin: what it points to.
    """
    if group == groups.BACKENDS:
        from ciphertune import backend

        return _class_unfit(name, plugin, backend.Backend, backend.INTERFACE_VERSION) or _security_unfit(plugin)
    if group == groups.TRANSPORTS:
        from ciphertune import transport

        return _class_unfit(name, plugin, transport.Transport, transport.INTERFACE_VERSION) or _serving_unfit(plugin)
    if group == groups.PLUGINS:
        return _hooks_unfit(plugin)
    return None


def _class_unfit(name: str, plugin: Any, base: type, version: int) -> str | None:
    home = f"{base.__module__}.{base.__name__}"
    if not (isinstance(plugin, type) and issubclass(plugin, base)):
        what = f"the class {plugin.__name__}" if isinstance(plugin, type) else f"a {type(plugin).__name__}"
        return f"it is {what}, and must be a subclass of {home}"
    if abstract := sorted(getattr(plugin, "__abstractmethods__", ())):
        return f"{plugin.__name__} leaves {', '.join(abstract)} of {home} without an implementation"
    own = getattr(plugin, "name", None)
    if own != name:
        return f"{plugin.__name__} calls itself {own!r}: its attribute 'name' must be the entry point's, {name!r}"
    return _version_unfit(plugin, version) or _options_unfit(plugin, "Options", taken=True) or _set_up_unfit(plugin)


def _set_up_unfit(plugin: type) -> str | None:
    """The framework makes objects of the options, of a transport around another also of that, and lists of nothing."""
    from ciphertune.transport import WrappingTransport

    wraps = issubclass(plugin, WrappingTransport)
    for given in ((), (None,), (None, None)) if wraps else ((), (None,)):
        try:
            inspect.signature(plugin).bind(*given)
        except TypeError:
            wanted = "self, options=None, inner=None" if wraps else "self, options=None"
            handed = "options, inner" if wraps else "options"
            return (
                f"{plugin.__name__}.__init__ cannot be called as the framework does: leave it out, as options are in "
                f"self.options, or write 'def __init__({wanted})' and call super().__init__({handed})"
            )
        except ValueError:  # one without a signature, as of C
            break
    return None


def _version_unfit(plugin: Any, version: int) -> str | None:
    stated = getattr(plugin, "interface", None)
    if stated is None or stated == version:
        return None
    return f"it is written for version {stated!r} of the interface, and this is version {version}"


def _options_unfit(plugin: Any, attribute: str, *, taken: bool) -> str | None:
    options = getattr(plugin, attribute, None)
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        return f"{plugin.__name__}.{attribute} is not a dataclass"
    if why := unreadable(options):
        return f"{plugin.__name__}.{attribute}: {why}"
    common = {field.name for field in dataclasses.fields(SessionOptions)} if taken else set()
    if names := sorted(common & {field.name for field in dataclasses.fields(options)}):
        return f"{plugin.__name__}.{attribute} has {', '.join(names)}, an option of every selection string"
    return None


def _security_unfit(plugin: type) -> str | None:
    if inspect.isfunction(inspect.getattr_static(plugin, "security")):
        return f"{plugin.__name__}.security is a method, and must be a property"
    return None


def _serving_unfit(plugin: Any) -> str | None:
    if plugin.ServeOptions is None:
        return None
    from ciphertune.transport import Transport

    if plugin.serve.__func__ is Transport.serve.__func__:  # type: ignore[attr-defined]
        return f"{plugin.__name__} has ServeOptions and no 'serve'"
    return _options_unfit(plugin, "ServeOptions", taken=False)


def _hooks_unfit(plugin: Any) -> str | None:
    if isinstance(plugin, types.FunctionType):
        return "it is a function, and must be a module, an object or a class with hooks"
    why = None
    if isinstance(plugin, type) and getattr(plugin, "Options", None) is not None:
        why = _options_unfit(plugin, "Options", taken=False)
    return why or _version_unfit(plugin, hookspecs.INTERFACE_VERSION) or hooks_fault(plugin)


def hooks_fault(plugin: Any) -> str | None:
    """Why the hooks of a module, an object or a class would not be called, None where they would be."""
    named = [name for name in dir(plugin) if name.startswith("ciphertune_")]
    marked = [name for name in named if hasattr(getattr(plugin, name), _MARK)]
    for name in marked:
        if name not in HOOKS and not getattr(getattr(plugin, name), _MARK).get("optionalhook"):
            near = difflib.get_close_matches(name, HOOKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known hooks: {', '.join(HOOKS)}"
            return f"there is no hook {name}; {hint}"
    for name in named:
        if name in HOOKS and name not in marked:
            return f"{name} is not marked with ciphertune.hookspecs.hookimpl, so that it would never be called"
    return None if marked else "it implements no hook"
