"""Memory that is reused from call to call: fresh pages cost more than the arithmetic done on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Named, growing buffers on one device. Not for several threads at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the same name and dtype are asked for again."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(count, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:count].view(*shape)

    def wipe(self) -> None:
        """Put zeros in the place of all that was computed, and keep the memory."""
        for buffer in self._buffers.values():
            buffer.zero_()
