"""Check vectors over real numbers: answers held against what was asked for once they are decrypted.

For backends whose answers are no exact integers. y = x·Mᵀ + e, with errors e that the backend's ``NoiseModel``
describes. For a secret vector r of ±1 and v = rᵀM, r·y − v·x is an error of known variance (Freivalds,
"Probabilistic machines can use less running time", 1977, with a tolerance).
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Backend, ClientHalf, Direction, LinearMap, NoiseModel, Preparation

VECTORS = 32
"""Vectors of a group and direction."""

DRAWN = 8
"""Vectors that an answer is held against, drawn once it is there."""

DEVIATIONS = 10.0
"""Standard deviations of the declared error beyond which an answer is wrong."""

_FEW_TOKENS = 16

Rows = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """The vectors for one piece: r of its outputs (32, outputs), and rᵀM (32, inputs), float64."""

    left: Tensor = dataclasses.field(repr=False)
    right: Tensor = dataclasses.field(repr=False)


class NoiseChecks:
    """Holds decrypted answers of a session against what was asked for. Its vectors are secret.

    Args:
        backend: whose ``noise`` and ``rounding`` say how far an answer may be off.
        device: where answers are decrypted.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend = backend
        self._device = device
        self._groups: dict[str, _GroupVectors] = {}

    def preparation(
        self, forward: LinearMap | None, backward: LinearMap, pieces: Sequence[LinearMap] = ()
    ) -> Preparation | None:
        """As ``ClientHalf.preparation``; None where the vectors cover these pieces already."""
        known = self._groups.get(backward.identity)
        edges = {edge for piece in pieces for rows in piece.rows for edge in rows}
        if known is not None and edges <= set(known.cuts):
            return None
        cuts = sorted({0, backward.in_features, *edges, *(() if known is None else known.cuts)})
        made = _GroupVectors(backward.in_features, backward.out_features, cuts, self._device)

        def keep(vectors: _GroupVectors) -> None:
            self._groups[backward.identity] = vectors
            if forward is not None:
                self._groups[forward.identity] = vectors

        return _Absorbing(made, keep)

    def right(
        self, whole: LinearMap, piece: LinearMap, x: Tensor, y: Tensor, encrypted: LinearMap, whole_x: Tensor
    ) -> bool:
        """Whether a decrypted answer is the product that was asked for, as far as its error lets that be told.

        Args:
            whole: the map of the group that vectors were made for.
            piece: the piece's map; its ``rows`` say where it stands in ``whole``.
            x: (tokens, piece.in_features).
            y: (tokens, piece.out_features), of any strides.
            encrypted: the map that the request was encrypted for.
            whole_x: (tokens, encrypted.in_features), what was encrypted.
        """
        found = self._groups[whole.identity].of(piece.direction, piece.rows)
        chosen: list[int] | slice = slice(None)
        if len(x) > _FEW_TOKENS:
            chosen = secrets.SystemRandom().sample(range(VECTORS), DRAWN)
        left, right = found.left[chosen], found.right[chosen]
        values = x.to(self._device, torch.float64)
        off = y.to(self._device, torch.float64) @ left.t() - values @ right.t()
        noise = self._backend.noise(encrypted)
        scale = None if noise is None else noise.token_scale(whole_x, encrypted)
        allowed = _deviation(self._backend.rounding(piece) or 0.0, noise, scale, piece, values, left, right)
        # A comparison with NaN is false.
        return bool((off.abs() <= DEVIATIONS * allowed).all())


class _Absorbing(Preparation):
    def __init__(self, vectors: _GroupVectors, keep: Callable[[_GroupVectors], None]) -> None:
        self._vectors = vectors
        self._keep = keep

    def absorb(self, row: int, codes: Tensor) -> None:
        self._vectors.absorb(row, codes)

    def finish(self) -> None:
        self._keep(self._vectors)


class _GroupVectors:
    """The vectors of a group for both directions, and for pieces that begin and end at ``cuts``."""

    def __init__(self, outputs: int, features: int, cuts: Sequence[int], device: torch.device) -> None:
        self.cuts = tuple(cuts)
        self._outputs = _signs(outputs, device)
        self._features = _signs(features, device)
        self._forward = torch.zeros(len(cuts) - 1, VECTORS, features, dtype=torch.float64, device=device)
        self._backward = torch.zeros(VECTORS, outputs, dtype=torch.float64, device=device)

    def absorb(self, row: int, codes: Tensor) -> None:
        """Take some rows of the group's codes, (rows, K) of any dtype, each row once."""
        values = codes.to(self._backward.device, torch.float64)
        for part, (start, stop) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
            first, last = max(start, row), min(stop, row + len(values))
            if first < last:
                self._forward[part] += self._outputs[:, first:last] @ values[first - row : last - row]
        self._backward[:, row : row + len(values)] = self._features @ values.t()

    def of(self, direction: Direction, rows: Rows) -> _Vectors:
        """The vectors for a piece of these rows of the group, all of them if there are none."""
        ranges = rows or ((0, self.cuts[-1]),)
        if direction == "backward":
            return _Vectors(self._features, _columns(self._backward, ranges))
        parts = [self._forward[self.cuts.index(start) : self.cuts.index(stop)].sum(dim=0) for start, stop in ranges]
        return _Vectors(_columns(self._outputs, ranges), torch.stack(parts).sum(dim=0))


def _deviation(
    rounding: float,
    noise: NoiseModel | None,
    scale: Tensor | None,
    piece: LinearMap,
    x: Tensor,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    """Standard deviation of r·y − v·x of an honest answer, (tokens, vectors) float64."""
    count = left.shape[1]
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)[:, None]
    arithmetic: Tensor = norm * (rounding * piece.max_norm * math.sqrt(count))
    if noise is None or scale is None:
        return arithmetic
    # A simulation draws the errors of outputs each by itself; added up, those of a real scheme weigh as v does.
    inputs = right.square().sum(dim=1).clamp_min(count * piece.max_norm**2)
    encoded = noise.input_variance * inputs + noise.returned_variance * _weight(noise, left)
    unit = scale.to(x.device).reciprocal()[:, None]
    deviation: Tensor = (arithmetic.square() + encoded * unit.square()).sqrt()
    return deviation


def _weight(noise: NoiseModel, left: Tensor) -> Tensor:
    """What output errors of variance 1 add to the variance of r·y, for each r: their number, were they independent."""
    alone: Tensor = left.square().sum(dim=1)
    if noise.correlation == 0:
        return alone
    shared = torch.zeros_like(alone)
    for start in range(0, left.shape[1], noise.period):
        part = left[:, start : start + noise.period]
        total = part.sum(dim=1, keepdim=True)
        # Steps of the correlated error, each of variance 4/period: halves before and behind count with other signs.
        behind = part.flip(1).cumsum(dim=1).flip(1) - total / 2
        rest = (noise.period - part.shape[1]) * (total[:, 0] / 2).square()
        shared += 4 / noise.period * (behind.square().sum(dim=1) + rest)
    return alone.mul(1 - noise.correlation).add(shared, alpha=noise.correlation)


def _signs(count: int, device: torch.device) -> Tensor:
    """(32, count) float64 of −1 and 1 from the operating system's generator."""
    raw = torch.frombuffer(bytearray(secrets.token_bytes(count * VECTORS // 8)), dtype=torch.uint8)
    bits = raw[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    signs: Tensor = bits.view(VECTORS, count).to(device, torch.float64).mul_(2).sub_(1)
    return signs


def _columns(values: Tensor, ranges: Rows) -> Tensor:
    return torch.cat([values[:, start:stop] for start, stop in ranges], dim=1)


def checkable(backend: Backend, maps: Mapping[Direction, LinearMap]) -> bool:
    """Whether a backend states how far honest answers of a group may be off."""
    return all(backend.rounding(each) is not None for each in maps.values())


def decrypts_pieces(client: ClientHalf[Any], backend: Backend) -> bool:
    """Whether each piece is decrypted by itself, and encrypted as ``ClientHalf`` does it or as a part of the whole."""
    kind = type(client)
    alone = kind.encrypt_pieces is ClientHalf.encrypt_pieces or backend.whole_products
    return alone and kind.take_reply is ClientHalf.take_reply
