"""The worker half: integer combinations of ciphertexts. Holds no secret and needs no cryptographic library."""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_ckks.ring import DEGREE, MODULUS, MODULUS_BITS, pack, unpack

_ROWS = 512
_DEPTH = (2 ** (53 - MODULUS_BITS) - 1) // 128
"""How many residues times codes add up below 2^53, where float64 ends to hold every integer."""


class CKKSWorker(WorkerHalf):
    """Adds up ciphertexts times weights: what SEAL's ``multiply_plain`` and ``add`` give, residue for residue.

    Multiplying a ciphertext by an integer multiplies its residues, so that all of it is one matrix product mod q,
    made of float64 products that are exact in whatever order a BLAS adds up.

    Args:
        device: where products run; it must know float64.
    """

    divisible = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, weight: Tensor) -> Tensor:
        """See ``WorkerHalf.prepare``."""
        if weight.dtype != torch.int8:
            raise ProtocolError(f"the ckks backend evaluates int8 weights, not {weight.dtype}")
        return weight

    def part(self, prepared: Tensor, start: int, stop: int) -> Tensor:
        """See ``WorkerHalf.part``: a view."""
        return prepared[start:stop]

    def reply_bytes(self, prepared: Tensor, direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``: a ciphertext an output, each as long as one of an input."""
        c = request.get("c")
        rows = prepared.shape[0 if direction == "forward" else 1]
        return 0 if c is None or c.dim() != 5 or len(c) == 0 else rows * (c.nbytes // len(c))

    def evaluate(self, prepared: Tensor, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``."""
        matrix = prepared if direction == "forward" else prepared.t()
        c = unpack(request, matrix.shape[1], ProtocolError, f"{direction} request")
        reply = torch.empty(len(matrix), *c.shape[1:], dtype=torch.int64)
        for block in range(c.shape[1]):
            columns = c[:, block].reshape(len(c), 2 * DEGREE).to(self._device, torch.float64)
            for start in range(0, len(matrix), _ROWS):
                rows = slice(start, start + _ROWS)
                reply[rows, block] = self._product(matrix[rows], columns).view(-1, 2, DEGREE).to(reply.device)
        return pack(reply)

    def _product(self, matrix: Tensor, columns: Tensor) -> Tensor:
        """``matrix · columns`` mod q: (rows, columns) int64."""
        total = torch.zeros(len(matrix), columns.shape[1], dtype=torch.int64, device=self._device)
        for start in range(0, matrix.shape[1], _DEPTH):
            part = slice(start, start + _DEPTH)
            total += (matrix[:, part].double() @ columns[part]).long()
            total.remainder_(MODULUS)
        return total
