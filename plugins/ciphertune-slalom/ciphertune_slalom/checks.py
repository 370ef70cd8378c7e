"""Check vectors: every answer is held against an equality of integers before it is unblinded.

A worker's answer to b is y = M·b mod 2^32. For a secret vector r, rᵀ·y ≡ (rᵀ·M)·b (Freivalds, "Probabilistic machines
can use less running time", 1977; Slalom checks answers in the same way, modulo a prime). Modulo 2^32, entries of r are
−1, 0, 0 or +1: a wrong answer differs by a non-zero vector, and divided by its largest power of two this has an odd
entry, which an odd entry of r sees with probability 1/2, whatever the others add.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from ciphertune.backend import Direction, columns_of
from ciphertune_slalom.arithmetic import product, wide_product

VECTORS = 64
"""Vectors of a group and direction."""

DRAWN = 8
"""Vectors that an answer is held against, drawn once it is there."""

FEW_TOKENS = 16
"""Tokens up to which all vectors are used."""

Rows = Sequence[tuple[int, int]]
"""Ranges of a group's rows; none for all of them."""

_draw = secrets.SystemRandom()


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The vectors for one piece of a product.

    Attributes:
        left: r of the piece's outputs, (64, outputs) int8.
        right: rᵀ·M, (64, inputs) int32, modulo 2^32.
    """

    left: Tensor = dataclasses.field(repr=False)
    right: Tensor = dataclasses.field(repr=False)

    def right_answer(self, request: Tensor, reply: Tensor) -> bool:
        """Whether a reply is what its request asks for, as far as freshly drawn vectors tell.

        A wrong one passes with probability at most 2^-8, or 2^-64 with up to ``FEW_TOKENS`` tokens.

        Args:
            request: (tokens, inputs) int32, as it was sent.
            reply: (tokens, outputs) int32, as it came.
        """
        chosen = list(range(VECTORS)) if len(request) <= FEW_TOKENS else _draw.sample(range(VECTORS), DRAWN)
        return torch.equal(product(reply, self.left[chosen]), wide_product(request, self.right[chosen]))


class CheckVectors:
    """The pool of a group, for both directions and any pieces that begin and end at ``cuts``. Secret.

    Args:
        outputs, features: N and K of the group.
        cuts: rows of the group, 0 and N among them, rising.
        device: of the codes.
    """

    def __init__(self, outputs: int, features: int, cuts: Sequence[int], device: torch.device) -> None:
        self.cuts = tuple(cuts)
        self._outputs = _entries(outputs, device)
        self._features = _entries(features, device)
        self._forward = torch.zeros(len(cuts) - 1, VECTORS, features, dtype=torch.int32, device=device)
        self._backward = torch.zeros(VECTORS, outputs, dtype=torch.int32, device=device)

    def absorb(self, row: int, codes: Tensor) -> None:
        """Take some rows of the group's codes, (rows, K) int8, each row once."""
        last = row + len(codes)
        self._backward[:, row:last] = product(self._features.to(torch.int32), codes)
        for part, (start, stop) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
            top, bottom = max(start, row), min(stop, last)
            if top < bottom:
                entries = self._outputs[:, top:bottom].to(torch.int32)
                self._forward[part] += product(entries, codes[top - row : bottom - row].t())

    def covers(self, pieces: Sequence[Rows]) -> bool:
        """Whether all these pieces begin and end at cuts."""
        return {edge for rows in pieces for each in rows for edge in each} <= set(self.cuts)

    def of(self, direction: Direction, rows: Rows) -> Vectors:
        """The vectors for a piece of these rows of the group."""
        if direction == "backward":
            return Vectors(self._features, columns_of(self._backward, rows))
        ranges = rows or ((0, self.cuts[-1]),)
        parts = [self._forward[self.cuts.index(start) : self.cuts.index(stop)] for start, stop in ranges]
        return Vectors(columns_of(self._outputs, rows), torch.cat(parts).sum(0, dtype=torch.int32))


def cuts_of(outputs: int, pieces: Sequence[Rows]) -> list[int]:
    """Rows of a group at which some pieces begin and end, and its first and last."""
    return sorted({0, outputs, *(edge for rows in pieces for each in rows for edge in each)})


def _entries(count: int, device: torch.device) -> Tensor:
    """(64, count) int8 from the operating system's generator, each −1, 0, 0 or +1 by two bits."""
    raw = torch.frombuffer(bytearray(secrets.token_bytes(count * VECTORS // 4)), dtype=torch.uint8)
    pairs = torch.stack([raw.bitwise_right_shift(2 * place).bitwise_and(3) for place in range(4)], dim=1)
    entries = pairs.bitwise_and(1).to(torch.int8) - pairs.bitwise_right_shift(1).to(torch.int8)
    return entries.view(VECTORS, count).to(device)
