"""CKKS encryption on Microsoft SEAL, as a CipherTune backend.

Cheon, Kim, Kim, Song: Homomorphic Encryption for Arithmetic of Approximate Numbers (ASIACRYPT 2017). Tokens lie in the
slots, one ciphertext per input feature, so that a product needs integer combinations of ciphertexts and nothing else:
no rotations, no multiplication of ciphertexts, and no evaluation key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from ciphertune.backend import Backend, Buffers, ClientHalf, LinearMap, NoiseModel, SecurityStatement, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_ckks.ring import DEGREE, FIELDS, MODULUS, MODULUS_BITS, TOKENS, WIDTH


@dataclasses.dataclass(frozen=True)
class CKKSOptions:
    """The ckks backend has no options of its own."""


class CKKSBackend(Backend):
    """CKKS with 2048 tokens to a ciphertext; workers add up ciphertexts times int8 weights, exactly."""

    name = "ckks"
    interface = 1
    Options = CKKSOptions

    @property
    def security(self) -> SecurityStatement:
        """IND-CPA under Ring-LWE."""
        return SecurityStatement(
            True,
            192,
            "workers see only ciphertext, tokens in units of 2048, layer names and timing",
            f"Ring-LWE, n = {DEGREE}, log q = {MODULUS_BITS}, uniform ternary secret, centred binomial error of "
            "variance 10.5; Homomorphic Encryption Security Standard (HomomorphicEncryption.org, 2018), table 1, "
            "classical",
        )

    def noise(self, linear_map: LinearMap | None = None) -> NoiseModel:
        """The encryption's error; evaluation adds none.

        A coefficient of a fresh ciphertext carries the centred binomial error and the rounding of encoding. The two
        parts of a slot are sums of all n coefficients, weighted by cosines and sines whose squares add up to n/2. What
        wraps are coefficients; none is larger than the largest slot, whose parts are at most ``half_range`` each.
        """
        return NoiseModel(MODULUS / 2 / math.sqrt(2), DEGREE / 2 * (10.5 + 1 / 12), 0.0)

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``: two polynomials per feature and 2048 tokens."""
        each = -(-tokens // TOKENS) * 2 * DEGREE * WIDTH
        return linear_map.in_features * each, linear_map.out_features * each

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with a fresh key, which no file keeps."""
        from ciphertune_ckks.client import CKKSClient

        return CKKSClient(self.noise(), device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; there is no evaluation key."""
        from ciphertune_ckks.worker import CKKSWorker

        if fields != FIELDS or evaluation_key:
            raise ProtocolError(f"the ckks backend opens with {FIELDS} and no key: is the client of another version?")
        return CKKSWorker(device)
