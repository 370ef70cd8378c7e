"""The option ``--backends`` of commands that start workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ciphertune._support.offered import OFFERED


def backends_option() -> Callable[[Any], Any]:
    """The option, whose text ``offered_backends`` reads."""
    return click.option(
        "--backends",
        default=",".join(OFFERED),
        show_default=True,
        metavar="NAME,…",
        help="Backends that clients may ask for; 'all' for every one that is installed.",
    )


def offered_backends(text: str) -> list[str] | None:
    """Names that the option gives; None for all that are installed.

    Raises:
        SelectionError: a name is unknown, or there is none.
        PluginError: a backend cannot be imported.
    """
    from ciphertune.errors import SelectionError
    from ciphertune.plugins import registry

    if text.strip() == "all":
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SelectionError("--backends names no backend: give names, as mlwe,clear, or all")
    for name in names:
        registry.load(registry.BACKENDS, name)
    return names
