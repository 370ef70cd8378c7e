"""A loader of the micro-batches of each optimizer step, whose position can be stored and restored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ciphertune.errors import CheckpointError, TrainingError
from ciphertune.training import rng
from ciphertune.training.batches import digest, length_of

_END = object()


class ResumableLoader:
    """Loads the micro-batches of one optimizer step after the other, epoch after epoch.

    A shuffling loader draws its order from random states when an epoch begins. Those states are kept here, so that
    the same order can be drawn again and read up to the same position.

    Args:
        data: re-iterable of batches.
        accumulation: micro-batches per step; an epoch's last step takes what is left.

    Attributes:
        length: batches per epoch; None where data has no length.
        epoch: the epoch being read, from 1; 0 before the first.
        consumed: batches of the epoch that were read.
    """

    def __init__(self, data: Iterable[Any], accumulation: int) -> None:
        self.data = data
        self.accumulation = accumulation
        self.length = length_of(data)
        self.epoch = 0
        self.consumed = 0
        self._iterator: Iterator[Any] | None = None
        self._generators = _generators(data)
        self._at_start: dict[str, Any] = {}
        self._before_last: dict[str, Any] = {}
        self._last: list[Any] = []

    @property
    def epoch_complete(self) -> bool:
        """Whether every batch of the epoch was read; False where data has no length."""
        return self.length is not None and self.consumed == self.length

    def next_step(self) -> list[Any]:
        """Read the micro-batches of the next step, at least one; begin the next epoch where one ended.

        Raises:
            TrainingError: an epoch has no batches, or more or fewer than ``len(data)``.
        """
        while True:
            if self._iterator is None:
                self.epoch += 1
                self.consumed = 0
                self._at_start = self.capture()
                self._iterator = self._iterate()
            self._before_last = self.capture()
            self._last = list(itertools.islice(self._iterator, self.accumulation))
            self.consumed += len(self._last)
            ended = len(self._last) < self.accumulation or (self.epoch_complete and next(self._iterator, _END) is _END)
            if self.length is not None and (ended != self.epoch_complete or self.consumed > self.length):
                raise TrainingError(
                    f"epoch {self.epoch}: the data has a length of {self.length} batches but gave "
                    f"{self.consumed if ended else 'more'}; make its length true, or give the data without a length "
                    "and steps"
                )
            if self.consumed == 0:
                raise TrainingError(f"the data has no batch in epoch {self.epoch}")
            if ended:
                self._iterator = None
            if self._last:
                return self._last

    def capture(self) -> dict[str, Any]:
        """Copy the random states that training and the order of the data depend on."""
        return {"process": rng.capture(), "loader": [g.get_state() for g in self._generators]}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the random states to those that ``capture`` returned."""
        rng.restore(state["process"])
        for generator, value in zip(self._generators, state["loader"], strict=True):
            generator.set_state(value)

    def state(self) -> dict[str, Any]:
        """The position, as plain values and tensors."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "ended": self._iterator is None,
            "last": len(self._last),
            "digest": digest(self._last[-1]) if self._last else "",
            "at_start": self._at_start,
            "before_last": self._before_last,
            "now": self.capture(),
        }

    def check(self, state: Any) -> None:
        """Check a state read from a file.

        Raises:
            CheckpointError: the data has another number of random generators.
            KeyError, TypeError, ValueError, RuntimeError: it is not what ``state`` returns.
        """
        epoch, consumed, last = state["epoch"], state["consumed"], state["last"]
        if not all(type(n) is int for n in (epoch, consumed, last)) or not (epoch > 0 and 0 < last <= consumed):
            raise ValueError("the position is not one that a run can be at")
        if type(state["ended"]) is not bool or type(state["digest"]) is not str:
            raise TypeError("the position is not one that a run can be at")
        for key in ("at_start", "before_last", "now"):
            rng.check(state[key]["process"])
            if len(state[key]["loader"]) != len(self._generators):
                raise CheckpointError(
                    f"the checkpoint's data had {len(state[key]['loader'])} random generators of its own and this has "
                    f"{len(self._generators)}: give the DataLoader and its sampler the generators that they had"
                )
            for value in state[key]["loader"]:
                torch.Generator().set_state(value)

    def resume(self, state: dict[str, Any]) -> None:
        """Go to a stored position by reading the epoch's batches up to it again.

        The random states are left as reading left them; call ``restore(state["now"])`` when training goes on.

        Raises:
            CheckpointError: the batch at the position is not the one that was read there.
        """
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        if state["ended"]:
            return
        self._at_start, self._before_last = state["at_start"], state["before_last"]
        self.restore(self._at_start)
        self._iterator = self._iterate()
        skipped = sum(1 for _ in itertools.islice(self._iterator, self.consumed - state["last"]))
        # Samples may be augmented with the states that training also draws from: put those back for the last ones.
        self.restore(self._before_last)
        self._last = list(itertools.islice(self._iterator, state["last"]))
        if skipped + len(self._last) != self.consumed or digest(self._last[-1]) != state["digest"]:
            raise CheckpointError(
                f"the data differs from the checkpoint's: batch {self.consumed} of epoch {self.epoch} is not the one "
                "that was trained on. Use the same data, batch size and number of workers; data with an order drawn "
                "from random states of its own must draw it from torch's, or from the DataLoader's generator"
            )

    def _iterate(self) -> Iterator[Any]:
        for source in _order_sources(self.data):
            set_epoch = getattr(source, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch - 1)
        return iter(self.data)


def _order_sources(data: Any) -> list[Any]:
    """The objects that may decide the order of the batches, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    found = [data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(source): source for source in found if source is not None}.values())


def _generators(data: Any) -> list[torch.Generator]:
    """The random generators of these objects, each once."""
    found = [getattr(source, "generator", None) for source in _order_sources(data)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
