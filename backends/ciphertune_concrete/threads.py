"""Concrete's compiler on threads other than the one that imported it."""

from __future__ import annotations

import importlib


def prepare_thread() -> None:
    """Let this thread compile: Concrete makes its stack of tags only for the thread that imports it."""
    context = importlib.import_module("concrete.fhe.extensions.tag").tag_context
    if not hasattr(context, "stack"):
        context.stack = []
