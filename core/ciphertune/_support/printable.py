"""Text from a peer, made fit for a terminal."""

from __future__ import annotations

LONGEST_TEXT = 2000
"""Characters of a peer's text that are shown at most."""


def printable(text: str, limit: int) -> str:
    r"""Return text on one line, without control characters and cut to a length.

    >>> printable("1.0\x1b[2J" + 50 * "x", 12)
    '1.0�[2Jxxxx…'
    """
    shown = "".join(c if c.isprintable() else "�" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
