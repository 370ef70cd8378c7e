"""A worker that lies: for tests of a client's checks, of a backend or of a whole session."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf


def _zero_row(codes: Tensor) -> Tensor:
    codes[0] = 0
    return codes


def _scaled_row(codes: Tensor) -> Tensor:
    codes[0] = (codes[0].double() * 0.9).to(codes.dtype)
    return codes


def _one_weight(codes: Tensor) -> Tensor:
    codes[-1, -1] += 1 if codes[-1, -1] < 0 else -1
    return codes


def _another_checkpoint(codes: Tensor) -> Tensor:
    return codes.flip(0).flip(1).contiguous()


WEIGHT_LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "a row of zeros": _zero_row,
    "a row scaled": _scaled_row,
    "one weight changed": _one_weight,
    "another checkpoint": _another_checkpoint,
}
"""Lies told with other weights than those that the client knows: made from a copy of the codes."""

REPLY_LIES = ("a bit flipped", "the top bit of a row", "two tokens swapped", "the answer before")
"""Lies told by changing good answers."""

LIES = (*WEIGHT_LIES, *REPLY_LIES)


class LyingWorker(WorkerHalf):
    """A worker half whose answers are wrong in one way.

    Args:
        half: the honest one.
        lie: one of ``LIES``.
        honest: answers that are right before the first lie.
    """

    def __init__(self, half: WorkerHalf, lie: str, honest: int = 0) -> None:
        if lie not in LIES:
            raise ValueError(f"{lie!r} is none of {LIES}")
        self._half = half
        self._lie = lie
        self._left = honest
        self._before: Buffers | None = None

    def prepare(self, weight: Tensor) -> tuple[object, object]:
        """See ``WorkerHalf.prepare``: the weight, and the one that lies are told with."""
        change = WEIGHT_LIES.get(self._lie)
        return self._half.prepare(weight), None if change is None else self._half.prepare(change(weight.clone()))

    @property
    def form(self) -> Hashable:
        """See ``WorkerHalf.form``."""
        return self._half.form

    def reply_bytes(self, prepared: tuple[object, object], direction: Direction, request: Buffers) -> int | None:
        """See ``WorkerHalf.reply_bytes``."""
        return self._half.reply_bytes(prepared[0], direction, request)

    def evaluate(self, prepared: tuple[object, object], direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``."""
        right, wrong = prepared
        self._left -= 1
        if self._left < 0 and wrong is not None:
            return self._half.evaluate(wrong, direction, request)
        honest = self._half.evaluate(right, direction, request)
        before, self._before = self._before, honest
        if self._left >= 0 or wrong is not None:
            return honest
        if self._lie == "the answer before":
            return honest if before is None else before
        return {name: self._changed(buffer.clone()) for name, buffer in honest.items()}

    def close(self) -> None:
        """See ``WorkerHalf.close``."""
        self._half.close()

    def _changed(self, buffer: Tensor) -> Tensor:
        if self._lie == "two tokens swapped":
            return buffer.index_select(-1, torch.tensor([1, 0, *range(2, buffer.shape[-1])]))
        raw = buffer.view(torch.uint8)
        if self._lie == "the top bit of a row":
            raw[0] ^= 0x80
        else:
            raw.view(-1)[-1] ^= 1
        return buffer
