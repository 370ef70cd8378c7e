"""The ring, and the wire form of ciphertexts: what both halves know, without keys or weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune.backend import Buffers
from ciphertune.errors import ProtocolError

DEGREE = 2048
MODULUS_BITS = 37
MODULUS = 137438822401
"""The largest prime of so many bits that is 1 mod 2·DEGREE."""
FIELDS = {"parameters": "ckks-2048-37"}
"""What a session opens with."""

SLOTS = DEGREE // 2
TOKENS = 2 * SLOTS
"""Tokens in a ciphertext: a slot holds a complex number, and so the values of two."""
WIDTH = -(-MODULUS_BITS // 8)
"""Bytes of a residue on the wire."""


def pack(residues: Tensor) -> Buffers:
    """Ciphertexts for the wire: ``c`` (features, blocks, 2, DEGREE, WIDTH) uint8, little-endian.

    Args:
        residues: (features, blocks, 2, DEGREE) int64 in [0, MODULUS), in the form that SEAL computes with (NTT).
    """
    digits = residues.contiguous().view(torch.uint8).view(*residues.shape, 8)
    return {"c": digits[..., :WIDTH].contiguous()}


def unpack(buffers: Buffers, features: int, error: type[ProtocolError], label: str) -> Tensor:
    """Residues from the wire as ``pack`` took them, for any number of blocks; raises ``error`` for anything else."""
    c = buffers.get("c")
    if c is None or c.dtype != torch.uint8 or c.dim() != 5 or 0 in c.shape:
        raise error(f"{label}: expected a buffer 'c' uint8 of 5 dimensions")
    if (len(c), *c.shape[2:]) != (features, 2, DEGREE, WIDTH):
        raise error(f"{label}: expected 'c' of shape ({features}, blocks, 2, {DEGREE}, {WIDTH}), got {tuple(c.shape)}")
    digits = torch.zeros(*c.shape[:4], 8, dtype=torch.uint8)
    digits[..., :WIDTH] = c
    residues = digits.view(torch.int64)[..., 0]
    if int(residues.max()) >= MODULUS:
        raise error(f"{label}: a residue in 'c' is not below the modulus")
    return residues
