"""The client half: blinding and unblinding. Holds pads and check vectors; never imports the worker half."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ciphertune.backend import (
    Buffers,
    ClientHalf,
    Encrypted,
    LinearMap,
    NoiseModel,
    Preparation,
    columns_of,
    in_order,
)
from ciphertune.callers import Owners
from ciphertune.errors import ReplyError, SecurityError, WrongReplyError
from ciphertune_slalom.arithmetic import product, wrapped
from ciphertune_slalom.checks import CheckVectors, Vectors, cuts_of
from ciphertune_slalom.pads import Batch, Pad, PadStock, most_tokens

_HELD = 1 << 22
"""Values of pads in memory at once while their products are made."""


@dataclasses.dataclass(frozen=True)
class State:
    """What unblinding the reply to one piece's request needs.

    Attributes:
        pad: of the whole request, used.
        scale: of every token, (tokens,) float64.
        sent: what was sent for the piece, (tokens, inputs) int32.
        vectors: that its answer is held against.
    """

    pad: Pad = dataclasses.field(repr=False)
    scale: Tensor = dataclasses.field(repr=False)
    sent: Tensor = dataclasses.field(repr=False)
    vectors: Vectors = dataclasses.field(repr=False)


class SlalomClient(ClientHalf[State]):
    """Sends ``b = m + pad`` modulo 2^32, m being x, scaled for each token and rounded.

    An answer is ``M·b = M·m + M·pad``, and the client made M·pad before. Every token has a pad of its own, so tokens of
    different callers share no secret.

    Args:
        noise: the backend's error model, which chooses scales.
        tokens: that pads are made for in a pass.
        device: where arithmetic runs; it must know float64.
    """

    def __init__(self, noise: NoiseModel, tokens: int, device: torch.device) -> None:
        self._noise = noise
        self._device = device
        self._stock = PadStock(tokens)
        self._checks: dict[str, CheckVectors] = {}
        self._lock = threading.Lock()

    def preparation(
        self, forward: LinearMap | None, backward: LinearMap, pieces: Sequence[LinearMap] = ()
    ) -> Preparation | None:
        """See ``ClientHalf.preparation``: pads for as many tokens as are missing, and check vectors for the pieces."""
        missing = {each: self._stock.missing(each.identity) for each in (forward, backward) if each is not None}
        rows = [piece.rows for piece in pieces]
        known = self._checks.get(backward.identity)
        vectors = None
        if known is None or not known.covers(rows):
            outputs, features = backward.in_features, backward.out_features
            held = [] if known is None else [[(cut, cut)] for cut in known.cuts]
            vectors = CheckVectors(outputs, features, cuts_of(outputs, [*rows, *held]), self._device)
        if vectors is None and not any(missing.values()):
            return None
        batches = [
            (each, Batch(each.in_features, each.out_features, count, self._device))
            for each, tokens in missing.items()
            for count in _cut(tokens, most_tokens(each.in_features))
        ]

        def done() -> None:
            if vectors is not None:
                with self._lock:
                    self._checks.update((each.identity, vectors) for each in missing)
            for each, batch in batches:
                self._stock.add(each.identity, batch)

        return SlalomPreparation(batches, vectors, self._device, done)

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[State]:
        """See ``ClientHalf.encrypt``. Buffer: ``b`` (tokens, features) int32."""
        return self.encrypt_pieces(x, linear_map, [linear_map])[0]

    def encrypt_pieces(self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap]) -> list[Encrypted[State]]:
        """See ``ClientHalf.encrypt_pieces``: one request; backward pieces get the columns of their rows.

        Raises:
            NotPreparedError: pads for so many tokens are not left.
        """
        vectors = [self._vectors(whole, piece) for piece in pieces]
        values = x.detach().to(self._device, torch.float64)
        scale = self._noise.token_scale(values, whole)
        pad = self._stock.take(whole.identity, len(x))
        sent = pad.take(lambda body: body.add_(wrapped((values * scale[:, None]).round_())))
        forward = whole.direction == "forward"
        found = []
        for piece, each in zip(pieces, vectors, strict=True):
            part = (sent if forward else columns_of(sent, piece.rows)).contiguous()
            found.append(Encrypted({"b": part}, State(pad, scale, part, each)))
        return found

    def encrypt_owned(
        self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap], owners: Owners
    ) -> list[Encrypted[State]]:
        """See ``ClientHalf.encrypt_owned``: each token has a pad of its own in any case."""
        return self.encrypt_pieces(x, whole, pieces)

    def check_reply(self, reply: Buffers, state: State, piece: LinearMap) -> None:
        """See ``ClientHalf.check_reply``: an equality modulo 2^32, before anything is unblinded."""
        if not state.vectors.right_answer(state.sent, self.take_reply(reply, state, piece)):
            raise WrongReplyError(f"{piece.label}: the answer is not the product that was asked for")

    def take_reply(self, reply: Buffers, state: State, piece: LinearMap) -> Tensor:
        """See ``ClientHalf.take_reply``: ``y`` (tokens, rows) int32, still blinded."""
        y = reply.get("y")
        shape = (len(state.sent), piece.out_features)
        if y is None or y.dtype != torch.int32 or y.shape != shape:
            got = "nothing" if y is None else f"{y.dtype} {tuple(y.shape)}"
            raise ReplyError(f"{piece.label}: expected int32 'y' {shape} in the reply, got {got}")
        return y.to(self._device)

    def put_together(
        self, parts: Sequence[Tensor], states: Sequence[State], whole: LinearMap, pieces: Sequence[LinearMap]
    ) -> Tensor:
        """See ``ClientHalf.put_together``: the pieces' replies as one, unblinded."""
        hidden, rows = states[0].pad.products(), sorted(each for piece in pieces for each in piece.rows)
        if whole.direction == "forward":
            y = in_order(parts, [piece.rows for piece in pieces]) - columns_of(hidden, rows)
        else:
            y = parts[0] - hidden
            for part in parts[1:]:
                y += part
        return y.to(torch.float64).div_(states[0].scale[:, None]).to(torch.float32)

    def decrypt(self, reply: Buffers, state: State, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``, of a product in one piece. Raises ``WrongReplyError`` too."""
        self.check_reply(reply, state, linear_map)
        return self.put_together([self.take_reply(reply, state, linear_map)], [state], linear_map, [linear_map])

    def close(self) -> None:
        """Forget pads and check vectors."""
        self._stock.close()
        with self._lock:
            self._checks.clear()

    def _vectors(self, whole: LinearMap, piece: LinearMap) -> Vectors:
        checks = self._checks.get(whole.identity)
        if checks is None or not checks.covers([piece.rows]):
            raise SecurityError(f"{whole.label}: nothing was prepared for this product; its weights were not read")
        return checks.of(whole.direction, piece.rows)


class SlalomPreparation(Preparation):
    """Makes the products of pads, and check vectors, from one pass over a group's codes.

    Args:
        batches: pads, and the map that they are for.
        vectors: to fill; None where they are here.
        device: where products are made.
        done: called once all is made.
    """

    def __init__(
        self,
        batches: Sequence[tuple[LinearMap, Batch]],
        vectors: CheckVectors | None,
        device: torch.device,
        done: Callable[[], None],
    ) -> None:
        self._batches = batches
        self._vectors = vectors
        self._device = device
        self._done = done

    def absorb(self, row: int, codes: Tensor) -> None:
        """See ``Preparation.absorb``."""
        codes = codes.to(self._device)
        if self._vectors is not None:
            self._vectors.absorb(row, codes)
        rows = slice(row, row + len(codes))
        for each, batch in self._batches:
            products = batch.products
            if products is None:
                raise SecurityError(f"{each.label}: the session was closed while pads were made")
            # Pads are made of their seed again for each block of codes, so that they need no memory of their own.
            step = max(16, _HELD // each.in_features)
            for start in range(0, batch.tokens, step):
                tokens = slice(start, min(start + step, batch.tokens))
                pads = batch.rows(tokens.start, tokens.stop)
                if each.direction == "forward":
                    products[tokens, rows] = product(pads, codes)
                else:
                    products[tokens] += product(pads[:, rows], codes.t())

    def finish(self) -> None:
        """See ``Preparation.finish``."""
        self._done()


def _cut(tokens: int, most: int) -> list[int]:
    """So many tokens in parts of ``most`` and a rest."""
    return [min(most, tokens - first) for first in range(0, tokens, most)]
