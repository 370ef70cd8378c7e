"""Hints: the public matrix times the weights of a group, made from its codes once and kept for every product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ciphertune.backend import LinearMap, NoiseModel, Preparation
from ciphertune_mlwe.checks import CheckVectors
from ciphertune_mlwe.hint_store import Hints
from ciphertune_mlwe.kernels import Kernel
from ciphertune_mlwe.params import ParameterSet
from ciphertune_mlwe.planes import digits_of
from ciphertune_mlwe.public import PublicMatrix
from ciphertune_mlwe.transforms import Transforms


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a client knows of a group's product in one direction.

    Attributes:
        parameters: of its ciphertexts.
        features: K, rows of the public matrix that its requests use.
        rows: outputs, once for each digit of the weight.
        noise: the errors of its ciphertexts.
        hints: H = M · A.
    """

    parameters: ParameterSet
    features: int
    rows: int
    noise: NoiseModel
    hints: Hints = dataclasses.field(repr=False)


class GroupPreparation(Preparation):
    """Several things that are made in one pass over a group's codes.

    Args:
        parts: what makes them.
    """

    def __init__(self, parts: Sequence[Preparation]) -> None:
        self._parts = parts

    def absorb(self, row: int, codes: Tensor) -> None:
        """See ``Preparation.absorb``."""
        for part in self._parts:
            part.absorb(row, codes)

    def finish(self) -> None:
        """See ``Preparation.finish``."""
        for part in self._parts:
            part.finish()


class CheckPreparation(Preparation):
    """Makes the check vectors of a group.

    Args:
        vectors: to fill.
        done: takes them.
    """

    def __init__(self, vectors: CheckVectors, done: Callable[[CheckVectors], None]) -> None:
        self._vectors = vectors
        self._done = done

    def absorb(self, row: int, codes: Tensor) -> None:
        """See ``Preparation.absorb``."""
        self._vectors.absorb(row, codes)

    def finish(self) -> None:
        """See ``Preparation.finish``."""
        self._done(self._vectors)


class HintPreparation(Preparation):
    """Makes the hints of both directions, or of the backward one alone, from one pass over a group's codes.

    Rows of the forward hint are final at once: they are products of those rows alone. The backward hint is a sum over
    rows, kept mod 2^32 until the last.

    Args:
        forward, backward: the group's maps; no forward one for a table.
        parameters: of their ciphertexts.
        digits: of the weight.
        public, transforms, kernel: the arithmetic.
        done: takes what was made: the map, the number of rows and the hints as ``Transforms.pack`` writes them.
    """

    def __init__(
        self,
        forward: LinearMap | None,
        backward: LinearMap,
        parameters: tuple[ParameterSet | None, ParameterSet],
        digits: int,
        public: PublicMatrix,
        transforms: Transforms,
        kernel: Kernel,
        done: Callable[[LinearMap, int, Tensor], None],
    ) -> None:
        self._maps = forward, backward
        self._parameters = parameters
        self._digits = digits
        self._public = public
        self._transforms = transforms
        self._kernel = kernel
        self._done = done
        self._outputs = backward.in_features
        self._features = backward.out_features
        self._forward: Tensor | None = None
        self._sums: Tensor | None = None

    def absorb(self, row: int, codes: Tensor) -> None:
        """See ``Preparation.absorb``."""
        ahead, back = self._parameters
        device = self._transforms.device
        if self._sums is None:
            # Memory is taken group by group, as codes come.
            self._sums = torch.zeros(self._digits, self._features, back.dimension, dtype=torch.int32, device=device)
            if ahead is not None:
                self._forward = self._transforms.empty_hints(self._digits * self._outputs, ahead)
        outputs = self._public.operand(row, row + len(codes), back.rank)
        for index, digit in enumerate(digits_of(codes.to(device))):
            if ahead is not None and self._forward is not None:
                inputs = self._public.operand(0, self._features, ahead.rank)
                part = torch.empty(len(codes), ahead.dimension, dtype=torch.int32, device=device)
                self._kernel.multiply(digit, inputs, part)
                self._transforms.pack(part, index * self._outputs + row, self._forward)
            self._kernel.multiply(digit.t(), outputs, self._sums[index], add=True)

    def finish(self) -> None:
        """See ``Preparation.finish``."""
        if self._sums is None:
            raise RuntimeError("no codes came")
        forward, backward = self._maps
        if forward is not None and self._forward is not None:
            self._done(forward, self._digits * self._outputs, self._forward)
            self._forward = None
        rows = self._digits * self._features
        hints = self._transforms.empty_hints(rows, self._parameters[1])
        self._transforms.pack(self._sums.view(rows, -1), 0, hints)
        self._sums = None
        self._done(backward, rows, hints)
