"""Products computed at the client, from codes that it has: nothing is encrypted and nothing is sent."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ciphertune.backend import Direction
from ciphertune.client.preparing import verified
from ciphertune.weights import CodeSource, LayerInfo

_instead: contextvars.ContextVar[Callable[[], StandIns | None]] = contextvars.ContextVar("ciphertune_stand_ins")


class StandIns:
    """Values in the place of products, made of the input without any weight, to see what a model's code does.

    Args:
        seed: other values for another seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def product(self, layers: Sequence[LayerInfo], direction: Direction, x: Tensor) -> Tensor:
        """Float32 values of a product's shape, of about its size, that differ for inputs that differ."""
        forward = direction == "forward"
        width = sum(layer.out_features for layer in layers) if forward else layers[0].in_features
        weights = torch.arange(x.shape[1], device=x.device, dtype=torch.float32).add(1.0 + self._seed).sin()
        columns = torch.arange(width, device=x.device, dtype=torch.float32)
        # Of the input's direction alone, so that rounding errors do not grow from layer to layer.
        angles = 3.0 * (x @ weights) / torch.linalg.vector_norm(x, dim=1).clamp_min(1e-6)
        # Codes reach to 127, and the scale of a channel follows.
        return 127.0 * torch.sin(angles[:, None] + columns + self._seed)


@contextlib.contextmanager
def standing_in(choose: Callable[[], StandIns | None]) -> Iterator[None]:
    """Have a function choose what stands in for each product of this context (``contextvars``) in a ``with`` block."""
    token = _instead.set(choose)
    try:
        yield
    finally:
        _instead.reset(token)


def stand_ins() -> StandIns | None:
    """What stands in for the next product of this context; None where it is evaluated."""
    choose = _instead.get(None)
    return None if choose is None else choose()


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
