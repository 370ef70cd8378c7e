"""Check vectors: every answer is held against an equality of integers before anything is decrypted.

A worker's answer to b is Y = M·b mod q', q' = 2^24 or 2^32. For a secret vector r, rᵀ·Y ≡ (rᵀ·M)·b mod q' (Freivalds,
"Probabilistic machines can use less running time", 1977). Entries of r are −1, 0, 0 or +1: a wrong answer differs by a
non-zero vector, and divided by its largest power of two this has an odd entry, which an odd entry of r sees with
probability 1/2, whatever the others add.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import random
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ciphertune_mlwe import native
from ciphertune_mlwe.native.team import Call, spread
from ciphertune_mlwe.planes import digits_of, lifted
from ciphertune_mlwe.prg import SEED_BYTES, Keystream, room

VECTORS = 64
"""Vectors of a group and direction."""

DRAWN = 8
"""Vectors that an answer is held against, drawn once it is there."""

FEW_TOKENS = 16
"""Tokens up to which all vectors are used."""

_TILE = 64
_EXACT_FEATURES = 1 << 16
"""Summands of a float32 product of codes and entries of r that is exact: 2^7 · 2^16 < 2^24."""

Rows = Sequence[tuple[int, int]]
"""Ranges of a group's rows; none for all of them."""

_draw = random.SystemRandom()


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The vectors for one piece of a product.

    Attributes:
        left: r of the piece's outputs, (64, outputs) int8.
        right: rᵀ·M, (digits of the weight, 64, inputs) int32.
    """

    left: Tensor = dataclasses.field(repr=False)
    right: Tensor = dataclasses.field(repr=False)


class CheckVectors:
    """The pool of a group, for both directions and any pieces that its cuts allow. Secret.

    Args:
        seed: 32 bytes that the entries are drawn from.
        outputs, features, digits: N, K and digits of a code.
        cuts: rows at which pieces may begin and end, 0 and N among them, rising.
        device: of the codes.
    """

    def __init__(
        self, seed: bytes, outputs: int, features: int, digits: int, cuts: Sequence[int], device: torch.device
    ) -> None:
        self.cuts = tuple(cuts)
        self._seed = seed
        self._digits = digits
        self._device = device
        self._left = _entries(seed, b"outputs\0", outputs, device), _entries(seed, b"features", features, device)
        parts = len(self.cuts) - 1
        self._forward = torch.zeros(parts, digits, VECTORS, features, dtype=torch.int32, device=device)
        self._backward = torch.zeros(digits, VECTORS, outputs, dtype=torch.int32, device=device)
        self._found: dict[tuple[tuple[int, int], ...], Vectors] = {}
        self._finding = threading.Lock()

    def absorb(self, row: int, codes: Tensor) -> None:
        """Take some rows of the group's codes, each row once.

        Args:
            row: where they stand.
            codes: (rows, K) int8 or int16.
        """
        for index, digit in enumerate(digits_of(codes.to(self._device))):
            values = digit.to(torch.float32)
            for part, (start, stop) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
                first, last = max(start, row), min(stop, row + len(codes))
                if first < last:
                    rows = self._left[0][:, first:last].to(torch.float32)
                    self._forward[part, index] += _exact_product(rows, values[first - row : last - row])
            made = _exact_product(self._left[1].to(torch.float32), values.t())
            self._backward[index, :, row : row + len(codes)] = made

    def covers(self, pieces: Sequence[Rows]) -> bool:
        """Whether all these pieces begin and end at cuts."""
        return {edge for rows in pieces for piece in rows for edge in piece} <= set(self.cuts)

    def forward(self, rows: Rows) -> Vectors:
        """The vectors of forward products of a piece."""
        key = tuple(rows)
        with self._finding:
            if key not in self._found:
                ranges = self._ranges(rows)
                parts = [slice(*(bisect.bisect_left(self.cuts, edge) for edge in each)) for each in ranges]
                right = torch.cat([self._forward[part] for part in parts]).sum(0, dtype=torch.int32)
                self._found[key] = Vectors(_columns(self._left[0], ranges), right)
            return self._found[key]

    def backward(self, rows: Rows) -> Vectors:
        """The vectors of backward products of a piece, whose inputs are the group's outputs in these rows."""
        return Vectors(self._left[1], _columns(self._backward, self._ranges(rows)))

    @staticmethod
    def nbytes(outputs: int, features: int, digits: int, cuts: Sequence[int]) -> int:
        """Length of what ``to_bytes`` makes."""
        return SEED_BYTES + 4 * VECTORS * digits * ((len(cuts) - 1) * features + outputs)

    def to_bytes(self) -> bytes:
        """All of it, for a file that nobody else reads."""
        values = [each.cpu().numpy().astype("<i4", copy=False).tobytes() for each in (self._forward, self._backward)]
        return b"".join([self._seed, *values])

    def load(self, values: bytes) -> None:
        """Take what ``to_bytes`` made after the seed, which is that of this pool. The bytes are trusted."""
        found = torch.from_numpy(np.frombuffer(bytearray(values), dtype="<i4").copy()).to(self._device)
        size = self._forward.numel()
        self._forward.copy_(found[:size].view_as(self._forward))
        self._backward.copy_(found[size:].view_as(self._backward))

    def _ranges(self, rows: Rows) -> list[tuple[int, int]]:
        """Rows of a piece, those that adjoin as one range."""
        found: list[tuple[int, int]] = []
        for start, stop in rows or ((0, self.cuts[-1]),):
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, stop))
        return found


def cuts_of(outputs: int, pieces: Sequence[Rows]) -> list[int]:
    """Rows of a group at which some pieces begin and end, and its first and last."""
    return sorted({0, outputs, *(edge for rows in pieces for piece in rows for edge in piece)})


def right(vectors: Vectors, request: Tensor, reply: Tensor) -> bool:
    """Whether a reply is the product that its request asks for, as far as freshly drawn vectors tell.

    A wrong one passes with probability at most 2^-8, or 2^-64 with up to ``FEW_TOKENS`` tokens.

    Args:
        vectors: of the piece.
        request: (inputs, planes, tokens) uint8, as it was sent.
        reply: (digits · outputs, planes, tokens) uint8, as it came.
    """
    left, digits = vectors.left, vectors.right
    if request.shape[2] <= FEW_TOKENS and (library := native.library_for(request)) is not None:
        return _agrees(library, left, digits, request, reply)
    if request.shape[2] > FEW_TOKENS:
        chosen = torch.tensor(_draw.sample(range(VECTORS), DRAWN), device=request.device)
        left, digits = left.index_select(0, chosen), digits.index_select(1, chosen)
    answers = reply.tensor_split(digits.shape[0])
    sums = weighted_sums([(left, answer) for answer in answers] + [(digit, request) for digit in digits])
    return all(map(torch.equal, sums[: len(answers)], sums[len(answers) :]))


def _agrees(library: ctypes.CDLL, left: Tensor, digits: Tensor, request: Tensor, reply: Tensor) -> bool:
    """Whether the sums of all vectors agree, for few tokens: in one call, for calls take longer than sums."""
    request, reply = native.packed(request), reply.contiguous()
    left, digits = left.contiguous(), digits.contiguous()
    count, rows = left.shape
    features, planes, tokens = request.shape
    if reply.shape != (len(digits) * rows, planes, tokens) or digits.shape[1:] != (count, features):
        raise ValueError("the check vectors are those of another product")
    at = request.data_ptr(), request.stride(0), request.stride(1), digits.data_ptr(), features, planes, tokens, count
    return bool(library.ct_agrees(reply.data_ptr(), left.data_ptr(), rows, len(digits), *at))


def weighted_sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """``weights · values``, mod 2^8P and lifted to the top of 32 bits, for several pairs of as many tokens.

    Args:
        pairs: (count, rows) int32 or int8, and planes (rows, P, tokens) uint8, P of 3 or 4, lowest first.

    Returns:
        (count, tokens) int32 of each.
    """
    library = native.library_for(pairs[0][1])
    if library is None:
        return [_portable_sums(weights.to(torch.int32), lifted(planes)) for weights, planes in pairs]
    tokens = pairs[0][1].shape[2]
    few = tokens <= FEW_TOKENS
    pairs = [
        ((weights if few else weights.to(torch.int32)).contiguous(), native.packed(planes)) for weights, planes in pairs
    ]
    out = [torch.empty(weights.shape[0], tokens, dtype=torch.int32) for weights, _ in pairs]

    def calls(first: int, last: int) -> list[Call]:
        return [
            (
                "weighted_sums",
                (
                    native.pointer(planes) + first,
                    planes.stride(0),
                    planes.stride(1),
                    planes.shape[1],
                    planes.shape[0],
                    last - first,
                    native.pointer(weights),
                    weights.element_size(),
                    weights.shape[0],
                    native.pointer(sums) + 4 * first,
                    tokens,
                ),
            )
            for (weights, planes), sums in zip(pairs, out, strict=True)
        ]

    spread(library, tokens, _TILE, calls, tokens * sum(planes.shape[0] for _, planes in pairs))
    return out


def _columns(values: Tensor, ranges: Rows) -> Tensor:
    """Ranges of the last dimension; of one alone a view."""
    parts = [values[..., start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _portable_sums(weights: Tensor, values: Tensor) -> Tensor:
    """In float64, whose sums of products of 16-bit halves are exact for up to 2^20 rows."""
    w_low, w_high = _halves(weights)
    v_low, v_high = _halves(values)
    low = (w_low @ v_low).to(torch.int64)
    high = (w_low @ v_high + w_high @ v_low).to(torch.int64)
    total = low + high.bitwise_left_shift(16)
    return total.bitwise_left_shift(32).bitwise_right_shift(32).to(torch.int32)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The low 16 bits, unsigned, and the signed high ones, as float64."""
    low = values.bitwise_and(0xFFFF)
    return low.to(torch.float64), values.bitwise_right_shift(16).to(torch.float64)


def _entries(seed: bytes, label: bytes, count: int, device: torch.device) -> Tensor:
    """(64, count) int8, each −1, 0, 0 or +1 by two bits of a keystream."""
    size = count * VECTORS // 4
    stream = Keystream(seed, label=label).fill(np.empty(room(size), dtype=np.uint8), size)
    bits = torch.from_numpy(stream.copy())
    pairs = torch.stack([bits.bitwise_right_shift(2 * place).bitwise_and(3) for place in range(4)], dim=1)
    entries = pairs.bitwise_and(1).to(torch.int8) - pairs.bitwise_right_shift(1).to(torch.int8)
    return entries.view(count, VECTORS).t().contiguous().to(device)


def _exact_product(entries: Tensor, codes: Tensor) -> Tensor:
    """Of entries of r (64, A) and int8 codes (A, B), both as float32: int32."""
    total = torch.zeros(VECTORS, codes.shape[1], dtype=torch.int32, device=codes.device)
    for start in range(0, len(codes), _EXACT_FEATURES):
        part = slice(start, start + _EXACT_FEATURES)
        total += torch.mm(entries[:, part], codes[part]).to(torch.int32)
    return total
