"""Import of packages that only some commands and functions need."""

from __future__ import annotations

import importlib
from typing import Any

from ciphertune.errors import ConfigError


def import_optional(module: str, install: str) -> Any:
    """Import a module of a package that may not be installed.

    Args:
        module: dotted name.
        install: the command that installs it, for the error message.

    Returns:
        The module.

    Raises:
        ConfigError: it cannot be imported; the message ends with ``install``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs {module.partition('.')[0]}, which is missing: {install}") from error
