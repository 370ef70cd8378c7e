"""What tests of the server ask with."""

from __future__ import annotations

KEYS = ("ann-0123456789abcdef", "bob-0123456789abcdef")
SECRET = "zq7xw9"
"""A word of prompts that must be nowhere else."""


def ask(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]
