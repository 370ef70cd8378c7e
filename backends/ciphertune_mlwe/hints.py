"""Hints: the public matrix times the weights of a group, made from its codes once and kept for every product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ciphertune.backend import LinearMap, Preparation
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
        hints: H = M · A, as ``Transforms.pack`` keeps them.
    """

    parameters: ParameterSet
    features: int
    rows: int
    hints: Tensor = dataclasses.field(repr=False)


class HintPreparation(Preparation):
    """Makes the hints of both directions from one pass over a group's codes.

    Rows of the forward hint are final at once: they are products of those rows alone. The backward hint is a sum over
    rows, kept mod 2^32 until the last.

    Args:
        forward, backward: the group's maps.
        parameters: of their ciphertexts.
        digits: of the weight.
        public, transforms, kernel: the arithmetic.
        done: takes what was made, by the maps' identities.
    """

    def __init__(
        self,
        forward: LinearMap,
        backward: LinearMap,
        parameters: tuple[ParameterSet, ParameterSet],
        digits: int,
        public: PublicMatrix,
        transforms: Transforms,
        kernel: Kernel,
        done: Callable[[str, Prepared], None],
    ) -> None:
        self._maps = forward, backward
        self._parameters = parameters
        self._digits = digits
        self._public = public
        self._transforms = transforms
        self._kernel = kernel
        self._done = done
        self._outputs = forward.out_features
        self._features = forward.in_features
        self._forward = transforms.empty_hints(digits * self._outputs, parameters[0])
        shape = digits, self._features, parameters[1].dimension
        self._sums = torch.zeros(shape, dtype=torch.int32, device=transforms.device)

    def absorb(self, row: int, codes: Tensor) -> None:
        """See ``Preparation.absorb``."""
        ahead, back = self._parameters
        inputs = self._public.operand(0, self._features, ahead.rank)
        outputs = self._public.operand(row, row + len(codes), back.rank)
        part = torch.empty(len(codes), ahead.dimension, dtype=torch.int32, device=self._transforms.device)
        for index, digit in enumerate(digits_of(codes.to(self._transforms.device))):
            self._kernel.multiply(digit, inputs, part)
            self._transforms.pack(part, index * self._outputs + row, self._forward)
            self._kernel.multiply(digit.t(), outputs, self._sums[index], add=True)

    def finish(self) -> None:
        """See ``Preparation.finish``."""
        rows = self._digits * self._features
        backward = self._transforms.empty_hints(rows, self._parameters[1])
        self._transforms.pack(self._sums.view(rows, -1), 0, backward)
        made = (self._digits * self._outputs, self._forward), (rows, backward)
        for linear_map, parameters, (count, hints) in zip(self._maps, self._parameters, made, strict=True):
            self._done(linear_map.identity, Prepared(parameters, linear_map.in_features, count, hints))
        self._sums = self._sums.new_empty(0)
