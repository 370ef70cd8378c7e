"""Suggestions for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """Text that lists the known names and suggests the closest, for error messages.

    >>> closest("mlew", ["clear", "mlwe"])
    "did you mean 'mlwe'? Known: clear, mlwe"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}"
