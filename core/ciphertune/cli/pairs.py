"""Options of a transport, as commands take them."""

from __future__ import annotations

from collections.abc import Sequence

import click


def name_values(texts: Sequence[str]) -> dict[str, str]:
    """Values by name, from ``NAME=VALUE`` each. Raises ``click.BadParameter``."""
    values: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--option")
        values[name] = value
    return values
