"""One-time pads: made ahead for some tokens of a product, each used once, by the process that made it alone."""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from ciphertune.errors import NotPreparedError, SecurityError

SEED_BYTES = 32
_TAG_BYTES = 32
_BLOCK = 64
"""Bytes of a block of ChaCha20, which tokens begin at."""
_MOST_BLOCKS = 1 << 32
"""Blocks of one key: the counter has 32 bits."""
_ZEROS = memoryview(bytes(1 << 18))
# Linux has these: out of core dumps, wiped in forks (which Python has no name for).
_ADVICE = (getattr(mmap, "MADV_DONTDUMP", 16), 18) if sys.platform.startswith("linux") else ()

_GONE = (
    "a pad is used once, in the process that made it; this one was used, or belongs to another process or a closed "
    "session. Nothing was sent"
)


class Seed:
    """A key of the operating system, which a forked process does not find.

    A fork finds zeros here, and two processes would else use the same pads: so a random tag that is never zero is
    compared before and after each use, beside the process.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._tag = b"\1" + os.urandom(_TAG_BYTES - 1)
        if sys.platform == "win32":
            memory = mmap.mmap(-1, _TAG_BYTES + SEED_BYTES)
        else:
            memory = mmap.mmap(-1, _TAG_BYTES + SEED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for advice in _ADVICE:
                # Old kernels know one of them or none; the process is compared too.
                with contextlib.suppress(OSError):
                    memory.madvise(advice)
        memory[:] = self._tag + os.urandom(SEED_BYTES)
        self._memory = memory

    def use(self, use: Callable[[bytes], Tensor]) -> Tensor:
        """What ``use`` makes of the key. Raises ``SecurityError`` where it is gone."""
        self._check()
        found = use(self._memory[_TAG_BYTES:])
        # A fork or a close in the meantime must not let a key of zeros out.
        self._check()
        return found

    def wipe(self) -> None:
        """Overwrite it. Idempotent."""
        self._memory[:] = bytes(_TAG_BYTES + SEED_BYTES)

    def _check(self) -> None:
        if os.getpid() != self._process or self._memory[:_TAG_BYTES] != self._tag:
            raise SecurityError(_GONE)


class Batch:
    """Pads of one seed for some tokens of a product, and their products with the weight.

    Args:
        features, outputs: K and N of the product.
        tokens: how many; at most ``most_tokens``.
        device: where they are used.

    Attributes:
        products: (tokens, outputs) int32, to be filled by whoever prepares them.
        tokens: how many there are.
    """

    def __init__(self, features: int, outputs: int, tokens: int, device: torch.device) -> None:
        if tokens > most_tokens(features):
            raise ValueError(f"{tokens} pads of {features} values would repeat the keystream")
        self.tokens = tokens
        self.products: Tensor | None = torch.zeros(tokens, outputs, dtype=torch.int32, device=device)
        self._features = features
        self._device = device
        self._seed = Seed()
        self._left = tokens
        self._lock = threading.Lock()

    def rows(self, start: int, stop: int) -> Tensor:
        """The pads of some tokens, (stop - start, features) int32. Raises ``SecurityError`` where they are gone."""
        return self._seed.use(lambda key: self._keystream(key, start, stop))

    def used(self, tokens: int) -> None:
        """Take notice that so many pads were used; with the last the seed is overwritten."""
        with self._lock:
            self._left -= tokens
            if self._left <= 0:
                self._seed.wipe()

    def close(self) -> None:
        """Forget all of it. Idempotent."""
        self._seed.wipe()
        self.products = None

    def _keystream(self, key: bytes, start: int, stop: int) -> Tensor:
        blocks = _blocks(self._features)
        size = blocks * _BLOCK * (stop - start)
        # A key serves one batch, so the nonce is nothing but the number of the first block.
        nonce = (start * blocks).to_bytes(4, "little") + bytes(12)
        stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
        out = np.empty(size, dtype=np.uint8)
        for first in range(0, size, len(_ZEROS)):
            last = min(first + len(_ZEROS), size)
            stream.update_into(_ZEROS[: last - first], out.data[first:last])
        words = torch.from_numpy(out.view("<i4").astype(np.int32, copy=False)).view(stop - start, -1)
        return words[:, : self._features].to(self._device)


class Pad:
    """The pads of one product's tokens. ``take`` is what makes a request, and works once.

    Args:
        parts: batches, and the tokens of each that were handed to nobody else.
    """

    def __init__(self, parts: list[tuple[Batch, int, int]]) -> None:
        self._parts = parts
        # Popping from a list is one step, whatever threads do.
        self._unused = [parts]

    def take(self, use: Callable[[Tensor], Tensor]) -> Tensor:
        """Blind under this pad: ``use`` gets it, (tokens, features) int32, once and for all.

        Raises:
            SecurityError: it was used before, or is not what was made.
        """
        try:
            parts = self._unused.pop()
        except IndexError:
            raise SecurityError(_GONE) from None
        try:
            return use(_stacked([batch.rows(start, stop) for batch, start, stop in parts]))
        finally:
            for batch, start, stop in parts:
                batch.used(stop - start)

    def products(self) -> Tensor:
        """The weight's products with it, (tokens, outputs) int32, as often as wanted.

        Raises:
            SecurityError: the session was closed.
        """
        found = [(batch.products, start, stop) for batch, start, stop in self._parts]
        held = [products[start:stop] for products, start, stop in found if products is not None]
        if len(held) < len(found):
            raise SecurityError(_GONE)
        return _stacked(held)

    def _refuse(self, *_: object) -> NoReturn:
        raise SecurityError("a pad cannot be copied: it is used once")

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse


class PadStock:
    """The pads of one session that nobody has used, by product.

    Args:
        tokens: that there are pads for after a pass, for each product.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        # Batches in the order in which they are used, and the first token of each that nobody got.
        self._batches: dict[str, collections.deque[tuple[Batch, int]]] = {}
        self._wanted: dict[str, int] = {}
        self._made: weakref.WeakSet[Batch] = weakref.WeakSet()

    def missing(self, product: str) -> int:
        """Tokens to make pads for, so that there are enough for what was asked for last, and ``tokens`` at least."""
        self._check()
        with self._lock:
            return max(0, max(self._tokens, self._wanted.get(product, 0)) - self._left(product))

    def add(self, product: str, batch: Batch) -> None:
        """Take pads whose products are complete."""
        self._check()
        with self._lock:
            if self._closed:
                batch.close()
                return
            self._made.add(batch)
            self._batches.setdefault(product, collections.deque()).append((batch, 0))

    def take(self, product: str, tokens: int) -> Pad:
        """Pads for so many tokens, which nobody else gets.

        Raises:
            NotPreparedError: there are too few; none was taken.
            SecurityError: the stock is closed, or of another process.
        """
        self._check()
        with self._lock:
            if self._closed:
                raise SecurityError(_GONE)
            if (left := self._left(product)) < tokens:
                self._wanted[product] = tokens
                raise NotPreparedError(f"pads are left for {left} tokens, and {tokens} were to be sent")
            # Not what one product asked for once, for ever.
            self._wanted.pop(product, None)
            return Pad(self._cut(self._batches[product], tokens))

    def close(self) -> None:
        """Forget all pads, those that were handed out too; in a fork there are none."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._batches.clear()
            for batch in list(self._made):
                batch.close()

    @staticmethod
    def _cut(batches: collections.deque[tuple[Batch, int]], tokens: int) -> list[tuple[Batch, int, int]]:
        parts = []
        while tokens:
            batch, first = batches.popleft()
            last = min(first + tokens, batch.tokens)
            parts.append((batch, first, last))
            tokens -= last - first
            if last < batch.tokens:
                batches.appendleft((batch, last))
        return parts

    def _left(self, product: str) -> int:
        return sum(batch.tokens - first for batch, first in self._batches.get(product, ()))

    def _check(self) -> None:
        # Before the lock, which a thread of the parent may hold for ever in a fork.
        if os.getpid() != self._process:
            raise SecurityError(_GONE)


def most_tokens(features: int) -> int:
    """Tokens of a batch at most."""
    return _MOST_BLOCKS // _blocks(features)


def _blocks(features: int) -> int:
    """Blocks of keystream for a token."""
    return -(-4 * features // _BLOCK)


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
