"""A backend that encrypts nothing and prepares for few tokens at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ciphertune.backend import Encrypted, LinearMap, Preparation, columns_of
from ciphertune.errors import NotPreparedError
from ciphertune_clear import ClearBackend, ClearClient

TOKENS = 8


class RationedClient(ClearClient):
    """Counts the passes over the codes, and encrypts so many tokens of each product and direction after each."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.passes = 0
        self.lock = threading.Lock()

    def preparation(
        self, forward: LinearMap | None, backward: LinearMap, pieces: Sequence[LinearMap] = ()
    ) -> Preparation | None:
        """See ``ClientHalf.preparation``."""
        maps = [each for each in (forward, backward) if each is not None]
        short = [each.identity for each in maps if self.left.get(each.identity, 0) < TOKENS]
        return Passing(lambda: self.refill(short)) if short else None

    def refill(self, products: Sequence[str]) -> None:
        """Note a pass."""
        with self.lock:
            self.passes += 1
            self.left.update(dict.fromkeys(products, TOKENS))

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[int]:
        """See ``ClientHalf.encrypt``."""
        return self.encrypt_pieces(x, linear_map, [linear_map])[0]

    def encrypt_pieces(self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap]) -> list[Encrypted[int]]:
        """See ``ClientHalf.encrypt_pieces``."""
        with self.lock:
            left = self.left.get(whole.identity, 0)
            if left < len(x):
                raise NotPreparedError(f"{left} tokens are left")
            self.left[whole.identity] = left - len(x)
        forward = whole.direction == "forward"
        return [super(RationedClient, self).encrypt(x if forward else columns_of(x, p.rows), p) for p in pieces]


class Passing(Preparation):
    """A pass that reads codes and makes nothing of them."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done

    def absorb(self, row: int, codes: Tensor) -> None:
        """See ``Preparation.absorb``."""

    def finish(self) -> None:
        """See ``Preparation.finish``."""
        self._done()


class RationedBackend(ClearBackend):
    """``clear`` with a client half that has to prepare itself."""

    name = "rationed"
    prepares = True
    whole_products = True
    clients: ClassVar[list[RationedClient]] = []

    def client(self, device: torch.device) -> RationedClient:
        """See ``Backend.client``."""
        self.clients.append(RationedClient())
        return self.clients[-1]
