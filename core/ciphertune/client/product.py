"""One product at the workers: encrypt, send to every piece's worker, receive, decrypt, put together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Backend, Buffers, ClientHalf, Direction, LinearMap
from ciphertune.client.placement import Piece
from ciphertune.client.pool import WorkerPool
from ciphertune.client.request import PendingRequest
from ciphertune.errors import ReplyError
from ciphertune.interleaving.interleaver import wait_for_reply
from ciphertune.protocol import Message
from ciphertune.traffic import Exchange


class Product:
    """A product under way, whose costs are counted in its exchange.

    Args:
        backend, client: the encryption, and this session's half of it.
        pool: the workers.
        exchange: what the product is; its costs are added here.
    """

    def __init__(self, backend: Backend, client: ClientHalf[Any], pool: WorkerPool, exchange: Exchange) -> None:
        self._backend = backend
        self._client = client
        self._pool = pool
        self._exchange = exchange

    def forward(self, pieces: Sequence[Piece], x: Tensor, whole: LinearMap) -> Tensor:
        """``x Wᵀ``: one ciphertext for all pieces, their outputs side by side.

        Args:
            pieces: how the group is cut.
            x: (tokens, K), float32.
            whole: the map of the whole group.

        Returns:
            (tokens, N), float32, of any strides.
        """
        encrypted = self._encrypt(x, whole)
        with contextlib.ExitStack() as stack:
            requests = [self._send(piece, "forward", encrypted.buffers, stack) for piece in pieces]
            if len(pieces) == 1 and pieces[0].whole:
                return self._receive(requests[0], encrypted.state, pieces[0].forward)
            parts = [self._receive(r, encrypted.state, p.forward).t() for r, p in zip(requests, pieces, strict=True)]
            # Feature-major, as products come.
            y = torch.empty(whole.out_features, len(x), dtype=torch.float32, device=parts[0].device)
            for piece, part in zip(pieces, parts, strict=True):
                blocks = torch.split(part, [shard.rows for shard in piece.shards])
                for rows, block in zip(piece.rows, blocks, strict=True):
                    y[rows] = block
            return y.t()

    def backward(self, pieces: Sequence[Piece], g: Tensor) -> Tensor:
        """``g W``: a ciphertext for each piece's columns of g, their products summed.

        Args:
            pieces: how the group is cut.
            g: (tokens, N), float32.

        Returns:
            (tokens, K), float32, of any strides.
        """
        with contextlib.ExitStack() as stack:
            sent = []
            for piece in pieces:
                columns = g
                if not piece.whole:
                    columns = torch.cat([g[:, rows] for rows in piece.rows], dim=1)
                encrypted = self._encrypt(columns, piece.backward)
                request = self._send(piece, "backward", encrypted.buffers, stack)
                sent.append((request, encrypted.state, piece.backward))
            total = self._receive(*sent[0])
            for request, state, part in sent[1:]:
                total = total + self._receive(request, state, part)
            return total

    def _encrypt(self, x: Tensor, linear_map: LinearMap) -> Any:
        start = time.perf_counter()
        encrypted = self._client.encrypt(x, linear_map)
        self._exchange.encrypt_seconds += time.perf_counter() - start
        return encrypted

    def _send(
        self, piece: Piece, direction: Direction, buffers: Buffers, stack: contextlib.ExitStack
    ) -> PendingRequest:
        """Send the request for a piece; it is given up when ``stack`` unwinds."""
        start = time.perf_counter()
        allowance = self._backend.allowance(piece.map(direction), self._exchange.tokens)
        request = PendingRequest(self._pool, piece, direction, buffers, allowance)
        stack.callback(request.abandon)
        self._exchange.wait_seconds += time.perf_counter() - start
        self._exchange.requests += 1
        self._exchange.bytes_up += sum(buffer.nbytes for buffer in buffers.values())
        return request

    def _receive(self, request: PendingRequest, state: Any, linear_map: LinearMap) -> Tensor:
        """Wait for the reply, while other tasks take their turns, and decrypt it."""
        exchange, clock = self._exchange, time.perf_counter
        start = clock()
        reply, elsewhere = wait_for_reply(request.result)
        answered = clock()
        exchange.retries += request.attempts - 1
        exchange.bytes_down += reply.nbytes
        exchange.turn_seconds += elsewhere
        exchange.wait_seconds += answered - start - elsewhere
        exchange.evaluate_seconds += _seconds(reply)
        y = self._client.decrypt(reply.buffers, state, linear_map)
        if y.shape != (exchange.tokens, linear_map.out_features):
            raise ReplyError(f"{linear_map.label}: the reply decrypts to the wrong shape {tuple(y.shape)}")
        exchange.decrypt_seconds += clock() - answered
        return y


def _seconds(reply: Message) -> float:
    """Evaluation time as the worker states it."""
    value: Any = reply.fields.get("seconds", 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0
