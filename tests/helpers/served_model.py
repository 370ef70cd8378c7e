"""What tests of the server ask with, and looks into one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

KEYS = ("ann-0123456789abcdef", "bob-0123456789abcdef")
SECRET = "zq7xw9"
"""A word of prompts that must be nowhere else."""


def ask(text: str) -> Any:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def until(true: Callable[[], bool]) -> None:
    """Wait for something."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def batch(server: Any) -> list[Any]:
    """The answers under way."""
    answers: list[Any] = server._engine._decoder.answers
    return answers
