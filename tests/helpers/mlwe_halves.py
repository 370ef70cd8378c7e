"""Both halves of the mlwe backend around given codes, prepared as a session prepares them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ciphertune.backend import Direction, LinearMap
from ciphertune.weights import LayerWeight, describe, group_map
from ciphertune_mlwe import MLWEBackend, native
from ciphertune_mlwe.client import MLWEClient

CPU = torch.device("cpu")


class Halves:
    """A client and a worker of one layer.

    Args:
        codes: (N, K), int8 or int16.
        client: to use; a fresh one of the options if None.
        step: rows that are absorbed at once.
        options: of the backend.
    """

    def __init__(self, codes: torch.Tensor, client: MLWEClient | None = None, step: int = 64, **options: str) -> None:
        bits = str(8 * codes.element_size())
        self.codes = codes
        self.backend = MLWEBackend.from_text({"weight_bits": bits, "ahead": "0", **options})
        self.client: Any = client if client is not None else self.backend.client(CPU)
        self.worker: Any = MLWEBackend.worker(self.client.open_fields(), {}, CPU)
        info = describe("layer", LayerWeight(codes, torch.ones(len(codes))))
        self.maps: dict[Direction, LinearMap] = {
            "forward": group_map([info], "forward"),
            "backward": group_map([info], "backward"),
        }
        self.prepare(step=step)

    def prepare(self, pieces: Sequence[LinearMap] = (), step: int = 64) -> None:
        """Read the codes for what the client still lacks."""
        preparation = self.client.preparation(self.maps["forward"], self.maps["backward"], pieces)
        if preparation is not None:
            for row in range(0, len(self.codes), step):
                preparation.absorb(row, self.codes[row : row + step])
            preparation.finish()

    def matrix(self, direction: Direction) -> torch.Tensor:
        """The matrix of a direction, int64."""
        return self.codes.long() if direction == "forward" else self.codes.long().t()

    def product(self, x: torch.Tensor, direction: Direction = "forward") -> torch.Tensor:
        """Encrypt, evaluate, decrypt."""
        sent = self.client.encrypt(x, self.maps[direction])
        reply = self.worker.evaluate(self.worker.prepare(self.codes), direction, sent.buffers)
        y: torch.Tensor = self.client.decrypt(reply, sent.state, self.maps[direction])
        return y

    def exact(self, x: torch.Tensor, direction: Direction = "forward") -> torch.Tensor:
        """The product in float64."""
        return x.double() @ self.matrix(direction).double().t()


def random_codes(outputs: int, features: int, weight_bits: int = 8, seed: int = 0) -> torch.Tensor:
    """Codes of any values."""
    generator = torch.Generator().manual_seed(seed)
    top, dtype = (127, torch.int8) if weight_bits == 8 else (32639, torch.int16)
    return torch.randint(-top, top + 1, (outputs, features), dtype=dtype, generator=generator)


@contextmanager
def portable_code() -> Iterator[None]:
    """The tensor operations in the place of the compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        for half in ("client", "worker"):
            patch.setattr(f"ciphertune_mlwe.{half}.choose_kernel", lambda device: ("torch-float64", 1.0))
        yield


def negacyclic(a: npt.NDArray[np.int64], s: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The product modulo X^256 + 1 in exact integers, all in the order that ciphertexts keep coefficients in."""
    full = np.convolve(np.concatenate([a[0::2], a[1::2]]), np.concatenate([s[0::2], s[1::2]]))
    product = full[:256] - np.append(full[256:], 0)
    stacked: npt.NDArray[np.int64] = np.stack([product[:128], product[128:]], axis=1).reshape(-1)
    return stacked


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error over that of the exact values."""
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
