"""Errors of a plugin's own making, told apart from those of the network, the data and the user."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from types import TracebackType

from ciphertune.errors import CipherTuneError, PluginError, TransportError
from ciphertune.plugins import registry

_FUTURES = "futures"
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


def place_of(error: BaseException, asked_in: str = "") -> str:
    """File and line where an error was raised, without the folders above the package's own; empty where unknown.

    Args:
        error: as it was caught.
        asked_in: the file that asked the plugin, which is no place of its.
    """
    found = traceback.extract_tb(error.__traceback__)
    # An error that was put into a future is raised there again.
    frames = [each for each in found if _FUTURES not in Path(each.filename).parts and each.filename != asked_in]
    if not frames:
        return ""
    path = Path(frames[-1].filename)
    return f" at {path.parent.name}/{path.name}, line {frames[-1].lineno}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on this machine or on a device."""
    if isinstance(error, RuntimeError):  # of torch's allocator for processors, which has no type of its own
        return type(error).__name__ in _OUT_OF_MEMORY or "DefaultCPUAllocator: " in str(error)
    return type(error).__name__ in _OUT_OF_MEMORY


class blamed(contextlib.AbstractContextManager[None]):  # noqa: N801 - read as a verb
    """Turn what a plugin raises without meaning to into a ``PluginError`` that names it.

    Errors of CipherTune stay what they are, and so do those for want of memory and, but for transports, of the system:
    a full disk is no plugin's fault. A class, for a generator would cost each product a fiftieth of its time.

    Args:
        group: entry-point group of the plugin.
        name: of the plugin.
        doing: what was asked of it, for the message.
        quote: whether the error's own text may be shown: not where there are data that it may quote.

    Raises:
        PluginError: the plugin raised what it does not declare.
        TransportError: a transport raised an ``OSError``, which is the network's.
    """

    __slots__ = ("_doing", "_group", "_name", "_quote")

    def __init__(self, group: str, name: str, doing: str, *, quote: bool = False) -> None:
        self._group = group
        self._name = name
        self._doing = doing
        self._quote = quote

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, CipherTuneError) or out_of_memory(error):
            return
        title = registry.title(self._group, self._name)
        if isinstance(error, OSError):
            if self._group == registry.TRANSPORTS:
                raise TransportError(f"{title} failed in {self._doing}: {error}") from error
            return
        if absent := registry.missing_package(error, registry.installed_as(self._group, self._name)):
            raise PluginError(f"{title} failed in {self._doing}: {absent}") from error
        said = f": {error}" if self._quote else ""
        raise PluginError(
            f"{title} failed in {self._doing}: {type(error).__name__}{said}{place_of(error)}. This is a fault of the "
            "plugin"
        ) from error


def wrong_result(group: str, name: str, doing: str, why: str) -> PluginError:
    """The error for a plugin that returned something of another form."""
    return PluginError(f"{registry.title(group, name)}: {doing} {why}. This is a fault of the plugin")
