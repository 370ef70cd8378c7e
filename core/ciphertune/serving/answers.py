"""One answer under way: what is computed for it, and what whoever asked is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from ciphertune.serving.choosing import Chooser, LogProbabilities
from ciphertune.serving.request_error import RequestError
from ciphertune.serving.text import Detokenizer, StopTexts

Reason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text of an answer, with the log-probabilities of its tokens if they were asked for."""

    index: int
    text: str = dataclasses.field(repr=False)
    likely: tuple[LogProbabilities, ...] = dataclasses.field(default=(), repr=False)


@dataclasses.dataclass(frozen=True)
class End:
    """The end of an answer: why, and its tokens."""

    index: int
    reason: Reason
    tokens: int


@dataclasses.dataclass(frozen=True)
class Failure:
    """An answer that cannot be given."""

    index: int
    refusal: RequestError


Event = Piece | End | Failure


class Answer:
    """An answer under way.

    Args:
        index: among those of its request.
        caller: whose it is.
        prompt: tokens before it.
        limit: tokens at most.
        chooser: chooses its tokens.
        ends: tokens that end it.
        stops: texts that end it.
        text: makes text of its tokens.
        send: takes events, on any thread.
        fixed_length: tokens that are computed for it, wherever it ends; None for as many as it has.

    Attributes:
        computed: tokens computed for it, those after its end too.
        cancelled: whether nobody waits for it any more.
    """

    def __init__(
        self,
        index: int,
        caller: str,
        prompt: Sequence[int],
        limit: int,
        chooser: Chooser,
        ends: frozenset[int],
        stops: Sequence[str],
        text: Detokenizer,
        send: Callable[[Event], None],
        fixed_length: int | None = None,
    ) -> None:
        self.index = index
        self.caller = caller
        self.prompt = list(prompt)
        self.computed = 0
        self.cancelled = False
        self._limit = limit
        self._chooser = chooser
        self._ends = ends
        self._text = text
        self._stops = StopTexts(stops)
        self._send = send
        self._fixed = fixed_length
        self._likely: list[LogProbabilities] = []
        self._ended = False

    @property
    def leaves(self) -> bool:
        """Whether nothing more is to be computed for it."""
        return self.cancelled or (self._ended and (self._fixed is None or self.computed >= self._fixed))

    def take(self, logits: Tensor, filler: int) -> int:
        """Choose the next token and send what it brings.

        Args:
            logits: (vocabulary,), float32, on the CPU; they are changed.
            filler: the token to go on with after the end, where the length is fixed.
        """
        self.computed += 1
        if self._ended or self.cancelled:
            return filler
        token, likely = self._chooser.choose(logits)
        if token in self._ends:
            self._end("stop")
            return token
        if likely is not None:
            self._likely.append(likely)
        self._tell(self._stops.add(self._text.add(token)))
        if self._stops.found:
            self._end("stop")
        elif self.computed == self._limit:
            self._end("length")
        return token

    def give_up(self) -> None:
        """Compute no more of it, as nobody waits for it; one that is complete goes on to its fixed length."""
        self.cancelled = self.cancelled or not self._ended

    def fail(self, refusal: RequestError) -> None:
        """Give up."""
        if not self._ended:
            self._ended = True
            self._send(Failure(self.index, refusal))
        self.cancelled = True

    def _tell(self, text: str) -> None:
        if text:
            likely, self._likely = tuple(self._likely), []
            self._send(Piece(self.index, text, likely))

    def _end(self, reason: Reason) -> None:
        self._ended = True
        if not self._stops.found:
            rest = self._stops.add(self._text.rest()) + self._stops.rest()
            if rest or self._likely:
                self._send(Piece(self.index, rest, tuple(self._likely)))
        self._send(End(self.index, reason, self.computed))
