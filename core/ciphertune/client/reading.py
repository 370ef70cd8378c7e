"""Codes read from the workers that hold them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ciphertune.client.connection import BACKOFF_SECONDS, Retry, WorkerConnection
from ciphertune.client.pool import WorkerPool
from ciphertune.errors import TransportError, WeightsError, WorkerError
from ciphertune.protocol import Message
from ciphertune.weights import LayerInfo, code_dtype

log = logging.getLogger(__name__)

_WITHHELD = (
    "{name} does not let its weights be read, and this encryption prepares itself from them. They are no secret "
    "against a client, who reads a layer of K inputs with K products. Ask the provider for the worker's folder and "
    "name it (weights=PATH), or use a backend that prepares nothing"
)


class WorkerCodes:
    """``CodeSource`` of the workers of a pool, asked in turn until one answers.

    Args:
        pool: the workers.
        groups: for each layer's name, the group of the pool that it belongs to.

    Attributes:
        bytes_down: bytes of codes that workers sent.
    """

    lasting = True

    def __init__(self, pool: WorkerPool, groups: dict[str, int]) -> None:
        self._pool = pool
        self._groups = groups
        self.bytes_down = 0
        self._liars: set[tuple[str, str]] = set()

    def read(self, layer: LayerInfo, start: int, stop: int) -> Tensor:
        """See ``CodeSource.read``.

        Raises:
            WeightsError: a worker withholds its weights, or none gives them.
            TransportError: the session was closed.
        """
        blocks = []
        for first, last, workers in self._places(layer):
            low, high = max(start, first), min(stop, last)
            if low < high:
                blocks.append((low, self._ask(layer, low, high, workers)))
        codes = [codes for _, codes in sorted(blocks, key=lambda block: block[0])]
        return codes[0] if len(codes) == 1 else torch.cat([part.cpu() for part in codes])

    def distrust(self, layer: LayerInfo, start: int, stop: int) -> bool:
        """See ``CodeSource.distrust``: workers that gave them are asked for this layer no more."""
        for first, last, workers in self._places(layer):
            if first < stop and start < last:
                honest = self._left(layer, workers)
                if not honest:
                    return False
                self._liars.add((honest[0].name, layer.name))
                log.warning("%s gave other codes for %s than its manifest says", honest[0].name, layer.name)
        return all(self._left(layer, workers) for _, _, workers in self._places(layer))

    def _places(self, layer: LayerInfo) -> list[tuple[int, int, list[WorkerConnection]]]:
        """Rows of a layer, and the workers that hold them."""
        return [
            (shard.start, shard.stop, self._pool.replicas(piece))
            for piece in self._pool.pieces(self._groups[layer.name])
            for shard in piece.shards
            if shard.name == layer.name
        ]

    def _left(self, layer: LayerInfo, workers: Sequence[WorkerConnection]) -> list[WorkerConnection]:
        return [each for each in workers if not each.excluded and (each.name, layer.name) not in self._liars]

    def _ask(self, layer: LayerInfo, start: int, stop: int, workers: Sequence[WorkerConnection]) -> Tensor:
        timeouts = self._pool.timeouts
        end = time.monotonic() + timeouts.deadline
        problem = "no worker holds them any more"
        most = (stop - start) * layer.in_features * code_dtype(layer.weight_bits).itemsize
        request = {"layer": layer.name, "start": start, "stop": stop}
        while True:
            refused = True
            for worker in self._left(layer, workers):
                if self._pool.closed.is_set():
                    raise TransportError(f"the session was closed while the codes of {layer.name} were read")
                try:
                    future = worker.submit(Message("weights", dict(request)), most)
                    reply = worker.reply(future, timeouts.timeout, "weights")
                except WorkerError as error:
                    if error.code == "withheld":
                        raise WeightsError(_WITHHELD.format(name=worker.name)) from error
                    problem = str(error)
                except (Retry, TransportError) as error:
                    problem, refused = f"{worker.name}: {error}", False
                else:
                    codes = reply.buffers.get("codes")
                    if codes is not None and codes.dim() == 2 and len(codes) == stop - start:
                        self.bytes_down += codes.nbytes
                        return codes
                    problem = f"{worker.name} answered a request for codes of {layer.name} without them"
                    log.warning("%s", problem)
                    self._liars.add((worker.name, layer.name))
            if refused or time.monotonic() > end:
                raise WeightsError(f"rows {start} to {stop} of {layer.name} could not be read: {problem}")
            self._pool.closed.wait(BACKOFF_SECONDS)
