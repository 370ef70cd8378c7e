"""Exact products in the clear: the reference that every other backend is held against. Protects nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ciphertune.backend import (
    FLOAT32_ROUNDING,
    Backend,
    Buffers,
    ClientHalf,
    Direction,
    Encrypted,
    LinearMap,
    SecurityStatement,
    WeightBits,
    WorkerHalf,
)
from ciphertune.callers import Owners
from ciphertune.errors import ProtocolError, ReplyError


@dataclasses.dataclass(frozen=True)
class ClearOptions:
    """Options of the clear backend.

    Attributes:
        weight_bits: 32 for the original float32 weights; 8 or 16 to see what quantizing them alone does.
    """

    weight_bits: Literal[8, 16, 32] = 32


class ClearClient(ClientHalf[int]):
    """Sends activations as they are."""

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[int]:
        """See ``ClientHalf.encrypt``; nothing is encrypted."""
        return Encrypted({"x": x}, len(x))

    def encrypt_owned(
        self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap], owners: Owners
    ) -> list[Encrypted[int]]:
        """See ``ClientHalf.encrypt_owned``: there are no secrets."""
        return self.encrypt_pieces(x, whole, pieces)

    def decrypt(self, reply: Buffers, state: int, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        y = reply.get("y")
        if y is None or y.dtype != torch.float32 or y.shape != (state, linear_map.out_features):
            raise ReplyError(f"{linear_map.label}: expected float32 ({state}, {linear_map.out_features})")
        return y


class ClearWorker(WorkerHalf):
    """Multiplies in float32."""

    divisible = True

    def prepare(self, weight: Tensor) -> Tensor:
        """See ``WorkerHalf.prepare``."""
        return weight

    def part(self, prepared: Tensor, start: int, stop: int) -> Tensor:
        """See ``WorkerHalf.part``: a view."""
        return prepared[start:stop]

    def reply_bytes(self, prepared: Tensor, direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``."""
        x = request.get("x")
        return 0 if x is None or x.dim() != 2 else 4 * len(x) * prepared.shape[0 if direction == "forward" else 1]

    def evaluate(self, prepared: Tensor, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``."""
        matrix = prepared if direction == "forward" else prepared.t()
        x = request.get("x")
        if x is None or x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != matrix.shape[1]:
            raise ProtocolError(f"expected a float32 buffer 'x' of shape (tokens, {matrix.shape[1]})")
        # What came over a wire lies at any address, and sums differ in their last bits with alignment.
        return {"y": torch.nn.functional.linear(x.clone(), matrix.to(torch.float32))}


class ClearBackend(Backend):
    """Exact plaintext products. The worker sees everything."""

    name = "clear"
    interface = 1
    Options = ClearOptions
    separates_callers = True

    @property
    def security(self) -> SecurityStatement:
        """Nothing is protected."""
        return SecurityStatement(False, None, "no protection: the worker sees activations and gradients")

    @property
    def weight_bits(self) -> WeightBits | None:
        """See ``Backend.weight_bits``: the option of that name."""
        bits = self.options.weight_bits
        return None if bits == 32 else bits

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``: float32 both ways."""
        return 4 * tokens * linear_map.in_features, 4 * tokens * linear_map.out_features

    def rounding(self, linear_map: LinearMap) -> float:
        """See ``Backend.rounding``: sums in float32."""
        return FLOAT32_ROUNDING

    def client(self, device: torch.device) -> ClearClient:
        """See ``Backend.client``."""
        return ClearClient()

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> ClearWorker:
        """See ``Backend.worker``."""
        return ClearWorker()
