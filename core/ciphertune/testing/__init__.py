"""Conformance suites for plugins: inherit a class, name the plugin, get the tests.

They need pytest. A suite that passes says that the framework can rely on the plugin; what a backend claims of its
security beyond what can be seen in its buffers, it cannot say.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "ciphertune.testing.backends", "ciphertune.testing.plugins", "ciphertune.testing.transports"
)

from ciphertune.testing.backends import BackendSuite  # noqa: E402
from ciphertune.testing.plugins import PluginSuite  # noqa: E402
from ciphertune.testing.transports import TransportSuite  # noqa: E402

__all__ = ["BackendSuite", "PluginSuite", "TransportSuite"]
