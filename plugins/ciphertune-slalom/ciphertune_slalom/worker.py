"""The worker half: one exact product modulo 2^32. Holds no secret and never imports the client half."""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_slalom.arithmetic import product


class SlalomWorker(WorkerHalf):
    """Multiplies what it is sent by the weight, modulo 2^32.

    Args:
        device: where products run; it must know float64.
    """

    divisible = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, weight: Tensor) -> Tensor:
        """See ``WorkerHalf.prepare``."""
        if weight.dtype != torch.int8:
            raise ProtocolError(f"the slalom backend evaluates int8 weights, not {weight.dtype}")
        return weight

    def part(self, prepared: Tensor, start: int, stop: int) -> Tensor:
        """See ``WorkerHalf.part``: a view."""
        return prepared[start:stop]

    def reply_bytes(self, prepared: Tensor, direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``: four bytes for every token and output."""
        b = request.get("b")
        return 0 if b is None else 4 * len(prepared if direction == "forward" else prepared.t()) * _tokens(b)

    def evaluate(self, prepared: Tensor, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``. ``b`` (tokens, features) int32 gives ``y`` (tokens, outputs) int32."""
        matrix = prepared if direction == "forward" else prepared.t()
        features = matrix.shape[1]
        b = request.get("b")
        if b is None or b.dtype != torch.int32 or b.dim() != 2 or b.shape[1] != features or len(b) == 0:
            got = "nothing" if b is None else f"{b.dtype} {tuple(b.shape)}"
            raise ProtocolError(f"expected int32 'b' (tokens ≥ 1, {features}), got {got}")
        return {"y": product(b.to(self._device), matrix.to(self._device))}


def _tokens(b: Tensor) -> int:
    return len(b) if b.dim() else 0
