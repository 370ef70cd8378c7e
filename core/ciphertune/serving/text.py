"""The text of an answer, token by token: whole characters only, up to the first text that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns tokens into text as they come.

    A few tokens before the new ones are decoded with them, since a tokenizer's spaces depend on what stands before, and
    what ends within a character is kept back. The method is that of text-generation-inference (``decode_token``).

    Args:
        tokenizer: of transformers.
        special: whether special tokens are part of the text.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._tokens: list[int] = []
        self._start = self._read = 0

    def add(self, token: int) -> str:
        """The text that a token brings; empty while a character is not complete."""
        self._tokens.append(token)
        return self._new(whole=True)

    def rest(self) -> str:
        """What was kept back."""
        return self._new(whole=False)

    def _new(self, whole: bool) -> str:
        before = self._decoded(self._tokens[self._start : self._read])
        text = self._decoded(self._tokens[self._start :])
        if len(text) <= len(before) or (whole and text.endswith(_UNFINISHED)):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        found: str = self._tokenizer.decode(tokens, skip_special_tokens=not self._special)
        return found


class StopTexts:
    """Text up to the first of some texts; what may be the beginning of one is kept back.

    Args:
        stops: the texts, none of them empty.

    Attributes:
        found: whether one came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be shown now that ``text`` came."""
        if self.found:
            return ""
        text = self._held + text
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return shown

    def rest(self) -> str:
        """What was kept back and is no stop after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
