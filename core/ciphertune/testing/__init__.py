"""Conformance suites and tools for plugins: inherit a class, name the plugin, get the tests.

They need pytest. A suite that passes says that the framework can rely on the plugin; what a backend claims of its
security beyond what can be seen in its buffers, it cannot say. ``ciphertune.testing.fixtures`` is a pytest plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ciphertune.testing.backends import BackendSuite as BackendSuite
    from ciphertune.testing.echo import EchoHandler as EchoHandler
    from ciphertune.testing.faults import Faults as Faults
    from ciphertune.testing.lies import LyingWorker as LyingWorker
    from ciphertune.testing.plugins import PluginSuite as PluginSuite
    from ciphertune.testing.served import ServedWorker as ServedWorker
    from ciphertune.testing.transports import TransportSuite as TransportSuite
    from ciphertune.testing.wrapping import WrappingSuite as WrappingSuite

# The suites load torch, which a pytest run that only has the fixtures at hand need not.
_HOMES = {
    "BackendSuite": "backends",
    "EchoHandler": "echo",
    "Faults": "faults",
    "LyingWorker": "lies",
    "PluginSuite": "plugins",
    "ServedWorker": "served",
    "TransportSuite": "transports",
    "WrappingSuite": "wrapping",
}
__all__ = sorted(_HOMES)

pytest.register_assert_rewrite(
    "ciphertune.testing.backends",
    "ciphertune.testing.plugins",
    "ciphertune.testing.transports",
    "ciphertune.testing.wrapping",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ciphertune.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ciphertune.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
