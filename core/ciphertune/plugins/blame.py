"""Errors of a plugin's own making, told apart from those of the network, the data and the user."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

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


@contextlib.contextmanager
def blamed(group: str, name: str, doing: str, *, quote: bool = False) -> Iterator[None]:
    """Turn what a plugin raises without meaning to into a ``PluginError`` that names it.

    Errors of CipherTune stay what they are, and so do those for want of memory and, but for transports, of the system:
    a full disk is no plugin's fault.

    Args:
        group: entry-point group of the plugin.
        name: of the plugin.
        doing: what was asked of it, for the message.
        quote: whether the error's own text may be shown: not where there are data that it may quote.

    Raises:
        PluginError: the plugin raised what it does not declare.
        TransportError: a transport raised an ``OSError``, which is the network's.
    """
    try:
        yield
    except CipherTuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        if isinstance(error, OSError):
            if group != registry.TRANSPORTS:
                raise
            raise TransportError(f"{registry.title(group, name)} failed in {doing}: {error}") from error
        said = f": {error}" if quote else ""
        raise PluginError(
            f"{registry.title(group, name)} failed in {doing}: {type(error).__name__}{said}{place_of(error)}. This is "
            "a fault of the plugin"
        ) from error


def wrong_result(group: str, name: str, doing: str, why: str) -> PluginError:
    """The error for a plugin that returned something of another form."""
    return PluginError(f"{registry.title(group, name)}: {doing} {why}. This is a fault of the plugin")
