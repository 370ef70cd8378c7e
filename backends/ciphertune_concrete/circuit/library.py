"""concrete-python, imported when the backend is first used."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import signal
import warnings
from collections.abc import Iterator
from typing import Any

from ciphertune.errors import PluginError
from ciphertune_concrete import versions
from ciphertune_concrete.ending import keep_status
from ciphertune_concrete.licence import notice

PACKAGE = "concrete-python"
SERIES = "2.11"
INSTALL = "pip install 'ciphertune[concrete-circuit]'"

_SIGACTION_BYTES = 512
"""More than a ``struct sigaction`` has anywhere: 152 on Linux, 16 on macOS."""


@functools.cache
def version() -> str:
    """The installed release. Raises ``PluginError`` where it is none that this backend was made for."""
    if (wrong := problem()) is not None:
        raise PluginError(wrong)
    return str(versions.installed(PACKAGE))


def problem() -> str | None:
    """Why the backend cannot run here by what is installed; None where it can."""
    return versions.problem("concrete-circuit", PACKAGE, SERIES, INSTALL)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Take back the handlers that native code installs for the whole process.

    LLVM and HPX, inside the library, install them when it is imported and when it first compiles. They replace those of
    Python without its knowledge, and theirs for a closed pipe ends the process.
    """
    libc = ctypes.CDLL(None)
    kept = {}
    for number in range(1, int(signal.SIGRTMIN) if hasattr(signal, "SIGRTMIN") else 32):
        action = ctypes.create_string_buffer(_SIGACTION_BYTES)
        if libc.sigaction(number, None, action) == 0:
            kept[number] = action
    try:
        yield
    finally:
        for number, action in kept.items():
            libc.sigaction(number, action, None)


@functools.cache
def _load() -> tuple[Any, Any]:
    version()
    notice(PACKAGE)
    try:
        with warnings.catch_warnings(), signals_kept():
            # Its package file still asks setuptools for namespaces, which warns wherever it can be imported at all.
            warnings.simplefilter("ignore")
            found = importlib.import_module("concrete.fhe"), importlib.import_module("concrete.compiler")
        keep_status()
        return found
    except ModuleNotFoundError as error:
        hint = " (setuptools dropped it: pip install 'setuptools<81')" if error.name == "pkg_resources" else ""
        raise PluginError(f"{PACKAGE} cannot be imported: it lacks {error.name}{hint}") from error
    except ImportError as error:
        raise PluginError(f"{PACKAGE} cannot be imported: {error}") from error


def fhe() -> Any:
    """The module ``concrete.fhe``. Raises ``PluginError``."""
    return _load()[0]


def compiler() -> Any:
    """The module ``concrete.compiler``. Raises ``PluginError``."""
    return _load()[1]
