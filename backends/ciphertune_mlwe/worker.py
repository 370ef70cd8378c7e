"""The worker half: integer matrix products with ciphertext. Holds no secret and never imports the client half."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, Joint, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_mlwe.kernels import KERNELS, Kernel, choose_kernel
from ciphertune_mlwe.planes import digits_of

PLANES = (3, 4)
"""Bytes that a value of a request may have."""
PANEL = 16
"""Tokens that are evaluated together at most: kernels multiply panels of so many columns, filled or not."""
_PART_SECONDS = 0.002
"""Of evaluation, about, between pauses."""


def _cut(
    weight: Tensor, b: Tensor, out: Tensor, parts: Sequence[tuple[slice, slice]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The arguments of the product of each part, of rows and tokens; of the whole where there is one part or none."""
    if len(parts) <= 1:
        yield weight, b, out  # as they are: to slice them takes as long as a small product
        return
    for rows, tokens in parts:
        yield weight[rows], b[:, :, tokens], out[rows, :, tokens]


class MLWEWorker(WorkerHalf):
    """Evaluates ``W · b`` exactly mod 2^24 or 2^32, as wide as the request. Knows nothing but the weights.

    Args:
        fields: what the client's ``open_fields`` sent: nothing.
        device: where products run.

    Raises:
        ProtocolError: the fields are not those of a client of this version.
    """

    divisible = True

    def __init__(self, fields: Mapping[str, Any], device: torch.device) -> None:
        if fields:
            raise ProtocolError("the mlwe backend opens sessions without fields")
        self._device = device
        name, speed = choose_kernel(device)
        self._kernel: Kernel = KERNELS[name]
        self._part = int(speed * 1e9 * _PART_SECONDS)

    def prepare(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See ``WorkerHalf.prepare``: int8 codes are used as they are, int16 codes are split into two digits."""
        if weight.dtype == torch.int8:
            return (weight,)
        if weight.dtype != torch.int16:
            raise ProtocolError(f"this backend evaluates int8 and int16 weights, not {weight.dtype}")
        if int(weight.max()) > 127 * 257 or int(weight.min()) < -128 * 257:
            raise ProtocolError("a 16-bit weight code is outside what two balanced digits hold, -32896 to 32639")
        return digits_of(weight)

    def part(self, prepared: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """See ``WorkerHalf.part``: views."""
        return tuple(digit[start:stop] for digit in prepared)

    def prepared_nbytes(self, prepared: tuple[Tensor, ...]) -> int:
        """See ``WorkerHalf.prepared_nbytes``: the digits of int16 codes; int8 codes are used as they are."""
        return sum(digit.nbytes for digit in prepared) if len(prepared) > 1 else 0

    def reply_bytes(self, prepared: tuple[Tensor, ...], direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``."""
        b = request.get("b")
        rows = prepared[0].shape[0 if direction == "forward" else 1]
        return 0 if b is None or b.dim() != 3 else len(prepared) * rows * b.shape[1] * b.shape[2]

    def evaluate(self, prepared: tuple[Tensor, ...], direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``.

        Returns:
            ``y`` (rows, planes, tokens) uint8, as many planes as the request's; rows are the outputs, once for each
            digit of the weight.
        """
        return self.evaluate_in_parts(prepared, direction, request)

    def evaluate_in_parts(
        self,
        prepared: tuple[Tensor, ...],
        direction: Direction,
        request: Buffers,
        pause: Callable[[], object] | None = None,
    ) -> Buffers:
        """See ``WorkerHalf.evaluate_in_parts``: some rows and tokens at a time; all at once without pauses."""
        digits = prepared if direction == "forward" else tuple(digit.t() for digit in prepared)
        rows, features = digits[0].shape
        b = self._read(request, features)
        planes, tokens = b.shape[1:]
        y = torch.empty(len(digits) * rows, planes, tokens, dtype=torch.uint8, device=self._device)
        # Parts pack values again and again, for nothing where nobody else waits.
        parts = [] if pause is None else self._kernel.parts(rows, features, tokens, self._part)
        begun = False
        for index, digit in enumerate(digits):
            for each in _cut(digit, b, y[index * rows : (index + 1) * rows], parts):
                if pause is not None and begun:
                    pause()
                self._kernel.product(*each)
                begun = True
        return {"y": y}

    def joint(self, prepared: tuple[Tensor, ...], direction: Direction, request: Buffers) -> Joint | None:
        """See ``WorkerHalf.joint``: requests of as many planes, with a panel of tokens in all."""
        b = request.get("b")
        features = prepared[0].shape[1 if direction == "forward" else 0]
        if b is None or b.dtype != torch.uint8 or b.dim() != 3 or b.shape[0] != features or b.shape[1] not in PLANES:
            return None
        return Joint(b.shape[1], b.shape[2], PANEL) if 1 <= b.shape[2] <= PANEL else None

    def evaluate_together(
        self, prepared: tuple[Tensor, ...], direction: Direction, requests: Sequence[Buffers]
    ) -> list[Buffers]:
        """See ``WorkerHalf.evaluate_together``: tokens side by side."""
        tokens = [request["b"].shape[2] for request in requests]
        b = torch.cat([request["b"] for request in requests], dim=2)
        y = self.evaluate(prepared, direction, {"b": b})["y"]
        return [{"y": part.contiguous()} for part in torch.split(y, tokens, dim=2)]

    def _read(self, request: Buffers, features: int) -> Tensor:
        b = request.get("b")
        if b is None or b.dtype != torch.uint8 or b.dim() != 3:
            raise ProtocolError("expected a uint8 buffer 'b' of shape (features, planes, tokens)")
        if b.shape[0] != features or b.shape[1] not in PLANES or b.shape[2] < 1:
            raise ProtocolError(
                f"buffer 'b' has shape {tuple(b.shape)}, expected ({features}, 3 or 4 planes, tokens ≥ 1)"
            )
        return b.to(self._device)
