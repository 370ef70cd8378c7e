"""What a worker holds: the weights of one model or of several."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from ciphertune.errors import HoldingsError
from ciphertune.protocol import Message
from ciphertune.weights import holdings_digest
from ciphertune.worker.store import WeightStore


class Prepared:
    """Weights that a backend prepared; sessions of one form share them while one is open.

    Attributes:
        value: what the backend's half made.
        nbytes: memory beside the weights.
    """

    def __init__(self, value: Any, nbytes: int) -> None:
        self.value = value
        self.nbytes = nbytes


class Holding:
    """The weights of one model.

    Args:
        name: of the model, for the operator's records.
        weights: what is held; it must not change any more.

    Attributes:
        name, weights: as given.
        blocks: the manifest.
        digest: of the manifest, by which clients name what they mean.
        prepared: by backend, form, and the block or the layers.
    """

    def __init__(self, name: str, weights: WeightStore) -> None:
        self.name = name
        self.weights = weights
        self.blocks = weights.manifest()
        self.digest = holdings_digest(self.blocks)
        self.prepared: weakref.WeakValueDictionary[tuple[str, Hashable, Hashable], Prepared] = (
            weakref.WeakValueDictionary()
        )


class Holdings:
    """All that a worker holds. Sessions keep what they use, also once it is held no more.

    Args:
        stores: by the models' names; the first is that of clients that name none.
    """

    def __init__(self, stores: Mapping[str, WeightStore]) -> None:
        self._lock = threading.Lock()
        self._all: tuple[Holding, ...] = ()
        self.replace(stores)

    def __iter__(self) -> Iterator[Holding]:
        return iter(self._all)

    def replace(self, stores: Mapping[str, WeightStore]) -> None:
        """Hold these from now on; what was held before and is among them stays as it is, with what was prepared."""
        with self._lock:
            known = {id(held.weights): held for held in self._all}
            new = []
            for name, store in stores.items():
                held = known.get(id(store)) or Holding(name, store)
                held.name = name
                new.append(held)
            # Two of the same content are one.
            self._all = tuple({held.digest: held for held in reversed(new)}.values())[::-1]

    def chosen(self, request: Message) -> Holding:
        """What a request means by its field ``holdings``; the first where it has none.

        Raises:
            HoldingsError: it is not held, or nothing is.
        """
        held = self._all
        digest = request.fields.get("holdings")
        found = [each for each in held if digest is None or each.digest == digest]
        if not found:
            raise HoldingsError("this worker does not hold what it held when the client asked for its manifest")
        return found[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(held.weights.nbytes for held in self._all)

    @property
    def layers(self) -> int:
        """Number of all layers."""
        return sum(len(held.weights) for held in self._all)
