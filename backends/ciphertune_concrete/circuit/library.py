"""concrete-python, imported when the backend is first used."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from typing import Any

from ciphertune.errors import PluginError
from ciphertune_concrete.licence import notice

PACKAGE = "concrete-python"
SERIES = "2.11"


@functools.cache
def version() -> str:
    """The installed release. Raises ``PluginError`` where it is none that this backend was made for."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise PluginError(
            f"the concrete-circuit backend needs {PACKAGE} {SERIES}, which is not installed here: "
            "pip install 'ciphertune[concrete-circuit]'"
        ) from None
    if not found.startswith(f"{SERIES}."):
        raise PluginError(
            f"the concrete-circuit backend was made for {PACKAGE} {SERIES}, and {found} is installed here: "
            "pip install 'ciphertune[concrete-circuit]'"
        )
    return found


@functools.cache
def _load() -> tuple[Any, Any]:
    version()
    notice(PACKAGE)
    try:
        with warnings.catch_warnings():
            # Its package file still asks setuptools for namespaces, which warns wherever it can be imported at all.
            warnings.simplefilter("ignore")
            return importlib.import_module("concrete.fhe"), importlib.import_module("concrete.compiler")
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


def prepare_thread() -> None:
    """Let this thread compile: the library readies only the one that imported it."""
    context = importlib.import_module("concrete.fhe.extensions.tag").tag_context
    if not hasattr(context, "stack"):
        context.stack = []
