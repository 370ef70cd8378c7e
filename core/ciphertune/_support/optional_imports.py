"""Packages that only some of the work needs, imported on first use."""

from __future__ import annotations

from typing import Any

from ciphertune.errors import ConfigError


def need(module: str, install: str) -> Any:
    """Import a module or say how to install it. Raises ``ConfigError``."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs {module.partition('.')[0]}, which is missing: {install}") from error
