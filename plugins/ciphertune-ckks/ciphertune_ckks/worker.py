"""The worker half: integer combinations of ciphertexts. Holds no secret and needs no cryptographic library."""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_ckks.residues import DEGREE, Ring

_LARGEST_CODE = 128
_ROWS = 512
_FEATURES = 4096


class CKKSWorker(WorkerHalf):
    """Adds up ciphertexts times weights: what SEAL's ``multiply_plain`` and ``add`` give, residue for residue.

    Multiplying a ciphertext by an integer multiplies its residues, so a product is one matrix product mod q. Float64
    holds integers to 2^53, and so sums of ``_depth`` residues times codes, exactly in whatever order they are added.

    Args:
        ring: the ciphertexts' ring.
        device: where products run; it must know float64.
    """

    def __init__(self, ring: Ring, device: torch.device) -> None:
        self._ring, self._device = ring, device
        self._depth = min((2 ** (53 - ring.bits) - 1) // _LARGEST_CODE, _FEATURES)

    def prepare(self, weight: Tensor) -> Tensor:
        """See ``WorkerHalf.prepare``."""
        if weight.dtype != torch.int8:
            raise ProtocolError(f"the ckks backend evaluates int8 weights, not {weight.dtype}")
        return weight

    def evaluate(self, prepared: Tensor, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``."""
        matrix = prepared if direction == "forward" else prepared.t()
        c = self._ring.unpack(request, matrix.shape[1], None, ProtocolError, f"a {direction} request")
        reply = torch.empty(len(matrix), *c.shape[1:], dtype=torch.int64)
        for block in range(c.shape[1]):
            columns = c[:, block].reshape(len(c), 2 * DEGREE).to(self._device, torch.float64)
            for start in range(0, len(matrix), _ROWS):
                rows = slice(start, start + _ROWS)
                reply[rows, block] = self._product(matrix[rows], columns).view(-1, 2, DEGREE)
        return self._ring.pack(reply)

    def _product(self, matrix: Tensor, columns: Tensor) -> Tensor:
        """``matrix · columns`` mod q, (rows, columns) int64."""
        total = torch.zeros(len(matrix), columns.shape[1], dtype=torch.int64, device=self._device)
        for start in range(0, matrix.shape[1], self._depth):
            part = slice(start, start + self._depth)
            total += (matrix[:, part].double() @ columns[part]).long()
            total.remainder_(self._ring.modulus)
        return total
