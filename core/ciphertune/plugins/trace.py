"""Trace of hook calls, for authors of plugins: one line each on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

VARIABLE = "CIPHERTUNE_TRACE_PLUGINS"


def tracing() -> bool:
    """Whether the environment asks for the trace: ``CIPHERTUNE_TRACE_PLUGINS`` is set, and not to 0."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def trace(hook: str, plugins: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Print a call.

    Args:
        hook: its name.
        plugins: names of those that are called, in order.
        arguments: numbers without a fraction, texts and None are shown, of all else the type: never a tensor's values.
    """
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in arguments.items())
    sys.stderr.write(f"{hook}({shown}) -> {', '.join(plugins) or 'no plugin'}\n")


def _shown(value: Any) -> str:
    return repr(value) if value is None or type(value) in (bool, int, str) else type(value).__name__
