"""Entry-point groups of plugins."""

from __future__ import annotations

BACKENDS = "ciphertune.backends"
TRANSPORTS = "ciphertune.transports"
PLUGINS = "ciphertune.plugins"
KINDS = {BACKENDS: "backend", TRANSPORTS: "transport", PLUGINS: "plugin"}
"""What is in each group, for messages."""
