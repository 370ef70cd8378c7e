"""A stock of masks of the mlwe backend with small blocks of random numbers, and a machine whose clocks a test sets."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch
from mlwe_halves import CPU

from ciphertune_mlwe.clones import CloneWatch
from ciphertune_mlwe.masks import Block, Mask, MaskStock, Order

FEATURES, OUTPUTS = 3, 2
THREAD = "ciphertune-masks"
_SECONDS = 30.0


class Machine:
    """Clocks and a generation that a test sets. As it stands, it is never copied and nothing ages."""

    def __init__(self, generation: int | None = 1) -> None:
        self.generation = generation
        self.wall = self.boot = 1000.0

    def pass_seconds(self, seconds: float) -> None:
        """Let both clocks go on."""
        self.wall += seconds
        self.boot += seconds

    def watch(self) -> CloneWatch:
        """A watch of this machine."""
        return CloneWatch(lambda: self.generation, lambda: self.wall, lambda: self.boot)


class Bench:
    """A stock, with what was made for it.

    Attributes:
        made: the orders, the threads that they were made on, and the masks.
        meanwhile: called while a block is made.
    """

    def __init__(
        self, columns: int = 256, ahead: int = 0, machine: Machine | None = None, banked: int = 1 << 30
    ) -> None:
        self.made: list[tuple[Order, str, torch.Tensor]] = []
        self.meanwhile: Callable[[], None] = lambda: None
        # Taking the next is one step, whatever threads do.
        self._seeds = itertools.count()
        watch = (machine or Machine()).watch()
        self.stock = MaskStock(self.make, self.size, lambda callers: columns, banked, ahead, watch)

    @staticmethod
    def size(order: Order) -> int:
        """Bytes of a block."""
        return 4 * (FEATURES + OUTPUTS) * order.tokens

    def make(self, order: Order, message: bytes = b"") -> Block:
        """A block of random numbers, none of them 0."""
        block = Block(FEATURES, OUTPUTS, order.tokens, CPU)
        generator = torch.Generator().manual_seed(next(self._seeds))
        for matrix in (block.body.matrix, block.hint.matrix):
            matrix.random_(1, 1 << 30, generator=generator)
        self.meanwhile()
        self.made.append((order, threading.current_thread().name, block.body.matrix.clone()))
        return block

    @property
    def orders(self) -> list[Order]:
        """What was made, in order."""
        return [order for order, *_ in self.made]

    @property
    def bodies(self) -> list[torch.Tensor]:
        """The masks, as they were before they were used."""
        return [body for *_, body in self.made]

    @property
    def ahead(self) -> list[int]:
        """Which of the blocks were made before they were asked for."""
        return [number for number, (_, name, _) in enumerate(self.made) if name == THREAD]

    def waiting(self) -> list[Order]:
        """Orders of blocks that lie ready."""
        with self.stock._lock:
            return [order for order, blocks in self.stock._ready.items() for _ in blocks]


def until(true: Callable[[], bool]) -> None:
    """Wait for something that comes about on another thread."""
    end = time.monotonic() + _SECONDS
    while not true():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.005)


def read(mask: Mask) -> torch.Tensor:
    """What a mask hides data with; it is used up."""
    return mask.take(torch.clone)


def at_once(*targets: Callable[[], object]) -> list[Future[object]]:
    """Run all at once, each on a thread of its own, and wait; what came of them."""
    gate = threading.Barrier(len(targets))
    outcomes: list[Future[object]] = [Future() for _ in targets]

    def run(target: Callable[[], object], outcome: Future[object]) -> None:
        gate.wait()
        try:
            outcome.set_result(target())
        except BaseException as error:
            outcome.set_exception(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(targets, outcomes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
