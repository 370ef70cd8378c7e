"""One product at the workers: encrypt, send to every piece's worker, receive, decrypt."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ciphertune.backend import Backend, Buffers, ClientHalf, Encrypted, LinearMap, columns_of
from ciphertune.callers import Owners
from ciphertune.client.connection import Opening, WorkerConnection
from ciphertune.client.placement import Piece
from ciphertune.client.pool import WorkerPool
from ciphertune.client.request import PendingRequest
from ciphertune.client.results import check_product, check_requests, check_tensor
from ciphertune.interleaving.interleaver import wait_for_reply
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed
from ciphertune.protocol import Message
from ciphertune.traffic import Exchange

PieceCheck = Callable[[LinearMap, Tensor, Tensor, LinearMap, Tensor], bool]
"""Whether a piece is right: its map, what the worker multiplied and what came of it, the map that it was encrypted for
and what was encrypted."""


class Rejected(Exception):  # noqa: N818 - the reason for other keys; what the caller sees is a WrongReplyError
    """A decrypted answer is not the product that was asked for. Its worker is excluded.

    Attributes:
        piece: what was asked for.
        worker: who gave it.
    """

    def __init__(self, piece: Piece, worker: WorkerConnection) -> None:
        super().__init__()
        self.piece = piece
        self.worker = worker


@dataclasses.dataclass(frozen=True)
class Keys:
    """A client half, and the request that opens sessions with its keys."""

    client: ClientHalf[Any]
    opening: Opening


class Product:
    """A product under way, whose costs are counted in its exchange.

    Args:
        backend: the encryption.
        keys: of the session.
        pool: the workers.
        exchange: what the product is; its costs are added here.
        check: holds a decrypted piece against what was asked for; None where that is not done.
    """

    def __init__(
        self, backend: Backend, keys: Keys, pool: WorkerPool, exchange: Exchange, check: PieceCheck | None = None
    ) -> None:
        self._backend = backend
        self._client = keys.client
        self._opening = keys.opening
        self._pool = pool
        self._exchange = exchange
        self._check = check

    def evaluate(
        self,
        pieces: Sequence[Piece],
        maps: Sequence[LinearMap],
        x: Tensor,
        whole: LinearMap,
        owners: Owners | None = None,
    ) -> Tensor:
        """``x Wᵀ`` or ``x W``, as ``whole.direction`` says.

        Args:
            pieces: how the product is cut.
            maps: of each piece in this direction; their ``rows`` say where they stand in ``whole``.
            x: (tokens, whole.in_features), float32.
            whole: the map of the whole group.
            owners: callers whose tokens have secrets of their own; None for a single one.

        Returns:
            As ``ClientHalf.put_together``.

        Raises:
            Rejected: a decrypted answer was found wrong.
            KeysReplaced: as ``PendingRequest.result``.
            PluginError: the client half raised what it does not declare, or gave something else than it should.
        """
        exchange, clock = self._exchange, time.perf_counter
        start = clock()
        name = type(self._backend).name
        with blamed(registry.BACKENDS, name, "encryption"):
            if owners is None:
                encrypted = self._client.encrypt_pieces(x, whole, maps)
            else:
                encrypted = self._client.encrypt_owned(x, whole, maps, owners)
        check_requests(name, encrypted, len(pieces))
        exchange.encrypt_seconds += clock() - start
        requests: list[PendingRequest] = []
        parts = []
        try:
            for piece, part, each in zip(pieces, maps, encrypted, strict=True):
                requests.append(self._send(piece, whole, part, each))
            for piece, request, part, each in zip(pieces, requests, maps, encrypted, strict=True):
                reply = self._receive(request)
                self._count(whole, part, each.buffers, reply)
                start = clock()
                with blamed(registry.BACKENDS, name, "decryption"):
                    parts.append(self._client.take_reply(reply, each.state, part))
                if self._check is not None:
                    check_tensor(name, parts[-1])
                if self._check is not None and not self._right(self._check, x, parts[-1], part, whole):
                    assert request.answered_by is not None
                    self._pool.exclude(request.answered_by, piece, whole.direction)
                    raise Rejected(piece, request.answered_by)
                exchange.decrypt_seconds += clock() - start
        finally:
            for request in requests:
                request.abandon()
        start = clock()
        with blamed(registry.BACKENDS, name, "decryption"):
            y = self._client.put_together(parts, [each.state for each in encrypted], whole, maps)
        outputs = whole.out_features if whole.direction == "backward" else sum(part.out_features for part in maps)
        check_product(name, y, (exchange.tokens, outputs), x, whole)
        exchange.decrypt_seconds += clock() - start
        return y

    def _right(self, check: PieceCheck, x: Tensor, y: Tensor, piece: LinearMap, whole: LinearMap) -> bool:
        """Whether a decrypted piece is what was asked for."""
        sent = x if whole.direction == "forward" else columns_of(x, piece.rows)
        if whole.direction == "forward" or self._backend.whole_products:
            return check(piece, sent, y, whole, x)
        return check(piece, sent, y, piece, sent)

    def _send(self, piece: Piece, whole: LinearMap, linear_map: LinearMap, encrypted: Encrypted[Any]) -> PendingRequest:
        """Send the request for a piece."""
        start = time.perf_counter()
        with blamed(registry.BACKENDS, type(self._backend).name, "its statement of time or of sizes", quote=True):
            allowance = self._backend.allowance(linear_map, self._exchange.tokens)
            most = self._backend.reply_bytes(whole, linear_map, self._exchange.tokens)
        buffers = encrypted.buffers

        def check(reply: Buffers) -> None:
            with blamed(registry.BACKENDS, type(self._backend).name, "its check of a reply"):
                self._client.check_reply(reply, encrypted.state, linear_map)

        request = PendingRequest(
            self._pool, piece, linear_map.direction, self._opening, buffers, check, allowance, most
        )
        self._exchange.wait_seconds += time.perf_counter() - start
        self._exchange.requests += 1
        return request

    def _receive(self, request: PendingRequest) -> Buffers:
        """Wait for the reply, while other tasks take their turns."""
        exchange, clock = self._exchange, time.perf_counter
        start = clock()
        reply, elsewhere = wait_for_reply(request.result)
        exchange.retries += request.attempts - 1
        exchange.turn_seconds += elsewhere
        exchange.wait_seconds += clock() - start - elsewhere - request.check_seconds
        exchange.decrypt_seconds += request.check_seconds
        exchange.evaluate_seconds += _seconds(reply, time.monotonic() - request.begun)
        return reply.buffers

    def _count(self, whole: LinearMap, piece: LinearMap, sent: Buffers, reply: Buffers) -> None:
        """Add the bytes of a piece, its request's and its reply's."""
        stated = None
        if self._backend.states_traffic:
            stated = self._backend.piece_traffic(whole, piece, self._exchange.tokens)
        up, down = stated or (_nbytes(sent), _nbytes(reply))
        self._exchange.bytes_up += up
        self._exchange.bytes_down += down


def _nbytes(buffers: Buffers) -> int:
    return sum(buffer.nbytes for buffer in buffers.values())


def _seconds(reply: Message, at_most: float) -> float:
    """Evaluation time as the worker states it, who may state anything: not more than has passed, nor less than none."""
    value: Any = reply.fields.get("seconds", 0.0)
    stated = float(value) if isinstance(value, (int, float)) else 0.0
    return min(stated, at_most) if stated > 0 else 0.0
