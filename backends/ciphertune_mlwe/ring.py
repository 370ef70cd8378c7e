"""Inner products over the negacyclic ring Z[X]/(X^d + 1), exact in float64.

A real polynomial of d coefficients folds into d/2 complex ones, p_i + i·p_{i+d/2}; a twist by exp(iπk/d) turns
negacyclic convolution into cyclic, which the FFT diagonalises (Nussbaumer, "Fast Fourier Transform and Convolution
Algorithms", 1982). Operands below 2³¹ against ternary secrets of n ≤ 2048 give integers below 2⁴³, far inside
float64's 53 bits.

In memory, coefficient i of the folded half stands at 2i and coefficient i + d/2 at 2i + 1, so that folding is a
change of view. For uniform ring elements and for tokens the order is a convention and costs nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ciphertune_mlwe.scratch import Scratch


class NegacyclicRing:
    """Transforms of one degree on one device, with scratch memory for chunks of a fixed size.

    Args:
        degree: d, a power of two.
        device: where tensors live.
    """

    def __init__(self, degree: int, device: torch.device) -> None:
        self.degree = degree
        self.half = degree // 2
        angles = torch.arange(self.half, dtype=torch.float64, device=device) * (math.pi / degree)
        self._twist = torch.polar(torch.ones_like(angles), angles)
        self._untwist = self._twist.conj().resolve_conj()

    def transform(self, polynomials: Tensor, out: Tensor | None = None) -> Tensor:
        """Values of real polynomials at d/2 roots of X^d + 1.

        Args:
            polynomials: (…, d) float64, in folded order; overwritten.
            out: (…, d/2) complex128, optional.

        Returns:
            (…, d/2) complex128.
        """
        folded = torch.view_as_complex(polynomials.view(*polynomials.shape[:-1], self.half, 2))
        folded.mul_(self._twist)
        result: Tensor = torch.fft.fft(folded, out=out)
        return result

    def inner(self, values: Tensor, secrets: Tensor, scratch: Scratch) -> Tensor:
        """``⟨a_k, s_j⟩`` for every k and j.

        Args:
            values: (K, r, d/2) complex128, transforms of the a_k.
            secrets: (J, r, d/2) complex128, transforms of the s_j.
            scratch: memory for the result, valid until its next use.

        Returns:
            (K, J·d) float64, integers up to an error far below ½, in folded order.
        """
        shape = (values.shape[0], secrets.shape[0], self.half)
        product = scratch.get("product", shape, torch.complex128)
        torch.mul(values[:, 0, None], secrets[:, 0], out=product)
        for index in range(1, values.shape[1]):
            product.addcmul_(values[:, index, None], secrets[:, index])
        result = scratch.get("inner", shape, torch.complex128)
        torch.fft.ifft(product, out=result)
        result.mul_(self._untwist)
        return torch.view_as_real(result).view(shape[0], -1)
