"""CKKS encryption on Microsoft SEAL, as a CipherTune backend.

Cheon, Kim, Kim, Song: Homomorphic Encryption for Arithmetic of Approximate Numbers (ASIACRYPT 2017). Tokens lie in the
slots, one ciphertext per input feature, so that a product needs integer combinations of ciphertexts and nothing else:
no rotations, no multiplication of ciphertexts, and no evaluation key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ciphertune.backend import (
    Backend,
    Buffers,
    ClientHalf,
    LinearMap,
    NoiseModel,
    SecurityStatement,
    WorkerHalf,
)
from ciphertune.errors import ProtocolError
from ciphertune_ckks.residues import DEGREE, TOKENS, Ring


@dataclasses.dataclass(frozen=True)
class CKKSOptions:
    """Options of the ckks backend.

    Attributes:
        modulus_bits: size of the ciphertext modulus. 37 leaves 192 bits of security; 29 leaves 256, saves a fifth of
            the traffic and has 256 times the error.
    """

    modulus_bits: Literal[29, 37] = 37


class CKKSBackend(Backend):
    """CKKS with 2048 tokens to a ciphertext; workers add up ciphertexts times int8 weights, exactly."""

    name = "ckks"
    Options = CKKSOptions

    @property
    def ring(self) -> Ring:
        """The ring of the chosen modulus."""
        return Ring(self.options.modulus_bits)

    @property
    def security(self) -> SecurityStatement:
        """IND-CPA under Ring-LWE."""
        return SecurityStatement(
            True,
            self.ring.security_bits,
            "workers see only ciphertext, tokens in units of 2048, layer names and timing",
            f"Ring-LWE, n = {DEGREE}, log q = {self.options.modulus_bits}, uniform ternary secret, centred binomial "
            "error of variance 10.5; Homomorphic Encryption Security Standard (HomomorphicEncryption.org, 2018), "
            "table 1, classical",
        )

    @property
    def noise(self) -> NoiseModel:
        """The encryption's error; evaluation adds none.

        A coefficient of a fresh ciphertext carries the centred binomial error and the rounding of encoding; the real
        and the imaginary part of a slot are each half of the sum of n of them. No coefficient is larger than the
        largest slot, whose two parts are at most ``half_range`` each.
        """
        return NoiseModel(self.ring.modulus / 2 / math.sqrt(2), DEGREE / 2 * (10.5 + 1 / 12), 0.0)

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``: two polynomials per feature and 2048 tokens."""
        each = -(-tokens // TOKENS) * 2 * DEGREE * self.ring.width
        return linear_map.in_features * each, linear_map.out_features * each

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with a fresh key, which no file keeps."""
        from ciphertune_ckks.client import CKKSClient

        return CKKSClient(self.ring, self.noise, device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; there is no evaluation key."""
        from ciphertune_ckks.worker import CKKSWorker

        if evaluation_key:
            raise ProtocolError("the ckks backend has no evaluation key")
        return CKKSWorker(Ring.read(fields), device)
