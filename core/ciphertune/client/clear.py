"""Products computed at the client, from codes that it has: nothing is encrypted and nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ciphertune.backend import Direction
from ciphertune.client.preparing import verified
from ciphertune.weights import CodeSource, LayerInfo


class ClearProducts:
    """Products of whole layers in float32. Each layer's codes are read once and kept as float32.

    Args:
        source: of the codes.
        trusted: whether they need not be held against the layers' hashes, as those of this process.
    """

    def __init__(self, source: CodeSource, *, trusted: bool) -> None:
        self._source = source
        self._trusted = trusted
        self._held: dict[str, Tensor] = {}

    def product(self, layers: Sequence[LayerInfo], direction: Direction, x: Tensor) -> Tensor:
        """``x Wᵀ`` or ``x W`` with the stacked codes of layers, float32.

        Raises:
            WeightsError: the codes are not those of the layers.
        """
        weights = [self._weight(layer, x.device) for layer in layers]
        if direction == "forward":
            return torch.cat([x @ weight.t() for weight in weights], dim=1)
        parts = torch.split(x, [layer.out_features for layer in layers], dim=1)
        total = parts[0] @ weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total += part @ weight
        return total

    def _weight(self, layer: LayerInfo, device: torch.device) -> Tensor:
        """The codes of a layer, (N, K) float32."""
        if layer.name not in self._held:
            if self._trusted:
                codes = self._source.read(layer, 0, layer.out_features)
            else:
                with ThreadPoolExecutor(1, "ciphertune-codes") as reader:
                    codes = torch.cat([part.cpu() for _, part in verified([layer], self._source, reader)])
            self._held[layer.name] = codes.to(device=device, dtype=torch.float32)
        return self._held[layer.name]
