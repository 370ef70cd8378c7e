"""Blinding with one-time pads modulo 2^32, as a CipherTune backend.

Tramèr and Boneh: Slalom: Fast, Verifiable and Private Execution of Neural Networks in Trusted Hardware (ICLR 2019).
What a trusted enclave does there, the client does here: it multiplies random pads by the weights ahead of time, sends
inputs plus pads, and subtracts the pads' products from the answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ciphertune.backend import Backend, Buffers, ClientHalf, LinearMap, NoiseModel, SecurityStatement, WorkerHalf
from ciphertune.errors import ProtocolError, SelectionError

MOST_TOKENS = 1 << 20
"""Tokens of the option ``tokens`` at most."""

MOST_FEATURES = 1 << 20
"""Inputs or outputs of a product at most."""


@dataclasses.dataclass(frozen=True)
class SlalomOptions:
    """Options of the slalom backend.

    Attributes:
        tokens: that pads are made for in one pass over the weights, for each product and direction. Memory for them
            grows in proportion.
    """

    tokens: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise SelectionError(f"option tokens={self.tokens} must be between 1 and {MOST_TOKENS}")


class SlalomBackend(Backend):
    """A request is the encoded input plus a pad, modulo 2^32; the client knows the pad's product already."""

    name = "slalom"
    Options = SlalomOptions

    prepares = True
    whole_products = True
    separates_callers = True

    @property
    def security(self) -> SecurityStatement:
        """Perfect secrecy of one-time pads, as far as the generator's output is random."""
        return SecurityStatement(
            True,
            256,
            "workers see only uniform numbers, shapes, layer names and timing",
            "one-time pads modulo 2^32, perfectly secret if uniform; they are the keystream of ChaCha20 (RFC 8439) "
            "under 256-bit keys of the operating system, which is the only assumption; 128 bits against Grover's "
            "search",
        )

    @property
    def checks_answers(self) -> bool:
        """See ``Backend.checks_answers``: always."""
        return True

    def noise(self, linear_map: LinearMap | None = None) -> NoiseModel:
        """Rounding of inputs alone; products are exact, and outputs wrap at 2^31."""
        return NoiseModel(half_range=2.0**31, input_variance=1 / 12, output_variance=0.0)

    def refuse(self, linear_map: LinearMap) -> str | None:
        """See ``Backend.refuse``: sums of the check's 16-bit halves must stay below 2^53."""
        most = max(linear_map.in_features, linear_map.out_features)
        return f"{most} features are more than {MOST_FEATURES}" if most > MOST_FEATURES else None

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``: four bytes a number."""
        return 4 * linear_map.in_features * tokens, 4 * linear_map.out_features * tokens

    def kept_bytes(self, forward: LinearMap | None, backward: LinearMap) -> int:
        """See ``Backend.kept_bytes``: the pads' products and the check vectors; pads are made of seeds when used."""
        from ciphertune_slalom.checks import VECTORS

        maps = [each for each in (forward, backward) if each is not None]
        products = sum(4 * int(self.options.tokens) * each.out_features for each in maps)
        vectors = sum(VECTORS * (4 * each.in_features + each.out_features) for each in maps)
        return products + vectors

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half without pads; each preparation makes some."""
        from ciphertune_slalom.client import SlalomClient

        return SlalomClient(self.noise(), self.options.tokens, device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; there are neither fields nor an evaluation key."""
        from ciphertune_slalom.worker import SlalomWorker

        if fields or evaluation_key:
            raise ProtocolError("the slalom backend opens without fields and without a key")
        return SlalomWorker(device)
