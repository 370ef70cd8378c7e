"""What both halves know: the ring, and how ciphertexts look on the wire. Neither keys nor weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Buffers
from ciphertune.errors import ProtocolError

DEGREE = 2048
SLOTS = DEGREE // 2
TOKENS = 2 * SLOTS
"""Tokens in a ciphertext: a slot holds a complex number, and so the values of two."""

# By bits of the modulus: the largest prime that is 1 mod 2n, and the classical security that the standard's table 1
# gives for n = 2048 and a ternary secret.
_RINGS = {29: (536813569, 256), 37: (137438822401, 192)}


@dataclasses.dataclass(frozen=True)
class Ring:
    """Z_q[X] / (X^2048 + 1), for a prime q of so many bits."""

    bits: int

    @property
    def modulus(self) -> int:
        """The prime q."""
        return _RINGS[self.bits][0]

    @property
    def security_bits(self) -> int:
        """Classical security."""
        return _RINGS[self.bits][1]

    @property
    def width(self) -> int:
        """Bytes of a residue on the wire."""
        return -(-self.bits // 8)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Ring:
        """From a client's opening fields. Raises ``ProtocolError``."""
        bits = fields.get("modulus_bits")
        if type(bits) is not int or bits not in _RINGS or len(fields) != 1:
            raise ProtocolError(f"the ckks backend opens with modulus_bits alone, one of {sorted(_RINGS)}")
        return cls(bits)

    def pack(self, residues: Tensor) -> Buffers:
        """Ciphertexts for the wire.

        Args:
            residues: (features, blocks, 2, n) int64 in [0, q), in the form that ``seal`` computes with (NTT).

        Returns:
            ``c`` (features, blocks, 2, n, width) uint8, little-endian.
        """
        digits = residues.cpu().contiguous().view(torch.uint8).view(*residues.shape, 8)
        return {"c": digits[..., : self.width].contiguous()}

    def unpack(
        self, buffers: Buffers, features: int, blocks: int | None, error: type[ProtocolError], label: str
    ) -> Tensor:
        """Ciphertexts from the wire, checked: nothing but residues of this ring in the shape that is due.

        Args:
            buffers: what came.
            features: how many there must be.
            blocks: of tokens, None for any number.
            error: to raise.
            label: for its message.

        Returns:
            (features, blocks, 2, n) int64 in [0, q).
        """
        c = buffers.get("c")
        shape = (features, blocks or "blocks", 2, DEGREE, self.width)
        if (
            c is None
            or len(buffers) != 1
            or c.dtype != torch.uint8
            or c.dim() != len(shape)
            or c.shape[1] == 0
            or any(got != due for got, due in zip(c.shape, shape, strict=True) if isinstance(due, int))
        ):
            raise error(f"{label}: expected one buffer 'c' uint8 ({', '.join(map(str, shape))})")
        digits = torch.zeros(*c.shape[:-1], 8, dtype=torch.uint8)
        digits[..., : self.width] = c
        residues = digits.view(torch.int64).view(c.shape[:-1])
        if int(residues.max()) >= self.modulus:
            raise error(f"{label}: a residue in 'c' is not below the modulus")
        return residues
