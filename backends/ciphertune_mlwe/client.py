"""The client half: encryption and decryption. Holds the secrets; never imports the worker half."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap, Preparation
from ciphertune.callers import Owners
from ciphertune.errors import InputError, ReplyError, SecurityError, WrongReplyError
from ciphertune_mlwe.checks import CheckVectors, Rows, Vectors, cuts_of, right
from ciphertune_mlwe.clones import CloneWatch
from ciphertune_mlwe.hint_store import Hints, HintStore
from ciphertune_mlwe.hints import CheckPreparation, GroupPreparation, HintPreparation, Prepared
from ciphertune_mlwe.kernels import KERNELS, choose_kernel
from ciphertune_mlwe.masks import BANK_COLUMNS, Block, Mask, MaskStock, Order
from ciphertune_mlwe.params import ParameterSet
from ciphertune_mlwe.planes import lifted
from ciphertune_mlwe.prg import SEED_BYTES, fresh_seed, hedged_seed, message_hash
from ciphertune_mlwe.public import PublicMatrix
from ciphertune_mlwe.transforms import LANES, hint_shape, make_transforms

MAX_TOKENS = 1 << 24
"""Tokens of one product at most."""

_FEWEST_BANK_COLUMNS = 32


@dataclasses.dataclass(frozen=True)
class EncryptionState:
    """State that decryption needs.

    Attributes:
        tokens, sent: tokens asked for, and sent.
        masks: of the ciphertext, each of the tokens after those of the one before.
        runs: tokens of each mask.
        unit: per sent token, float32: what one 2^-32 of the modulus is worth.
        b: what was sent for a piece, and ``vectors`` its check vectors; None where answers are not checked.
    """

    tokens: int
    sent: int
    masks: tuple[Mask, ...] = dataclasses.field(repr=False)
    runs: tuple[int, ...]
    unit: Tensor = dataclasses.field(repr=False)
    b: Tensor | None = dataclasses.field(default=None, repr=False)
    vectors: Vectors | None = dataclasses.field(default=None, repr=False)


class MLWEClient(ClientHalf[EncryptionState]):
    """Encrypts (tokens, features) as ``b_{k,j} = ⌊(⟨a_k, s_j⟩ + e_{k,j} + m_{k,j}) / 2^c⌋``.

    k is a feature, j a block of tokens. The public a_k are the same for all products of the session, the secrets s_j
    of no two.

    Args:
        parameters: chooses the set for a group's map.
        digits: of a weight code.
        pad_tokens: the number of tokens sent is rounded up to a multiple of this, to hide the exact one.
        banks: whether requests of few tokens share secrets.
        mask_bytes: memory for banks and for masks made ahead.
        ahead: whether masks are made ahead where workers are elsewhere.
        device: where encryption and decryption run.
        store: of hints and check vectors.
        check: whether answers are checked.
        seed: of the public matrix; None for a fresh one, or the one that hints on disk are of.
        watch: notices that the machine was copied.
    """

    def __init__(
        self,
        parameters: Callable[[LinearMap], ParameterSet],
        digits: int,
        pad_tokens: int,
        banks: bool,
        mask_bytes: int,
        ahead: bool,
        device: torch.device,
        store: HintStore | None = None,
        check: bool = True,
        seed: bytes | None = None,
        watch: CloneWatch | None = None,
    ) -> None:
        self._parameters = parameters
        self._digits = digits
        self._pad = pad_tokens
        self._banks = banks
        self._mask_bytes = mask_bytes
        self._device = device
        self._transforms = make_transforms(device)
        self._store = store or HintStore(1 << 62, 0, device)
        self._check = check
        self._checks: dict[str, CheckVectors] = {}
        self._seed = seed
        self._public = PublicMatrix(seed or fresh_seed(), b"", self._transforms)
        self._prepared: dict[str, Prepared] = {}
        # Of the banks for a number of callers.
        self._bank_columns: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stock = MaskStock(
            self._block, self._block_bytes, self._columns, mask_bytes, mask_bytes if ahead else 0, watch or CloneWatch()
        )

    def begin(self, model: bytes, remote: bool) -> None:
        """See ``ClientHalf.begin``: take hints of this model on disk into use; make masks ahead for workers elsewhere.

        A worker in this process leaves no processor idle, and masks are made faster by all of them at once.
        """
        self._stock.in_background = remote
        seed = self._store.open(model) if self._seed is None else None
        if seed is not None:
            self._public = PublicMatrix(seed, model, self._transforms)

    def compute_ahead(self, linear_map: LinearMap, tokens: int) -> float:
        """See ``ClientHalf.compute_ahead``: masks; of a bank the columns that the tokens take."""
        begun = time.perf_counter()
        share = self._stock.make(linear_map.identity, self._padded(tokens))
        return share * (time.perf_counter() - begun)

    def preparation(
        self, forward: LinearMap | None, backward: LinearMap, pieces: Sequence[LinearMap] = ()
    ) -> GroupPreparation | None:
        """See ``ClientHalf.preparation``: hints of both directions and check vectors, unless they are here or on disk.

        Raises:
            CacheError: hints would fit neither in memory nor on disk.
        """
        parts: list[Preparation] = []
        missing = [each for each in (forward, backward) if each is not None and not self._found(each)]
        if missing:
            shapes = [hint_shape(self._digits * each.out_features, self._parameters(each)) for each in missing]
            self._store.announce(sum(map(math.prod, shapes)))
            parameters = None if forward is None else self._parameters(forward), self._parameters(backward)
            kernel = KERNELS[choose_kernel(self._device)[0]]
            parts.append(
                HintPreparation(
                    forward, backward, parameters, self._digits, self._public, self._transforms, kernel, self._keep
                )
            )
        rows = [piece.rows for piece in pieces]
        # Hash under which the group's vectors are kept, of either direction.
        keys = [each.identity for each in (forward, backward) if each is not None]
        outputs, features = backward.in_features, backward.out_features
        if self._check and not self._covers(keys, outputs, features, rows):
            cuts = cuts_of(outputs, [*rows, *self._cuts(keys)])
            vectors = CheckVectors(fresh_seed(), outputs, features, self._digits, cuts, self._device)
            parts.append(CheckPreparation(vectors, lambda made: self._keep_checks(keys, made)))
        return GroupPreparation(parts) if parts else None

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[EncryptionState]:
        """See ``ClientHalf.encrypt``. Buffer: ``b`` (features, planes, tokens) uint8."""
        return self.encrypt_pieces(x, linear_map, [linear_map])[0]

    def encrypt_pieces(
        self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap]
    ) -> list[Encrypted[EncryptionState]]:
        """See ``ClientHalf.encrypt_pieces``: one ciphertext; backward pieces get the rows of their features."""
        return self.encrypt_owned(x, whole, pieces, (("", x.shape[0]),))

    def encrypt_owned(
        self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap], owners: Owners
    ) -> list[Encrypted[EncryptionState]]:
        """See ``ClientHalf.encrypt_owned``: one ciphertext, with masks of each caller's own for its columns."""
        product = self._product(whole)
        vectors = [self._vectors(whole, piece) for piece in pieces]
        tokens = x.shape[0]
        sent = self._padded(tokens)
        if sent > MAX_TOKENS:
            raise InputError(f"{whole.label}: {sent} tokens are more than the {MAX_TOKENS} of one product")
        values = x.detach().to(self._device, torch.float32)
        if sent > tokens:
            values = torch.cat([values, values.new_zeros(sent - tokens, values.shape[1])])
        norm = product.noise.encoded_norm(whole)
        runs = [count for _, count in owners]
        # What fills up the last tokens is zeros, which may be anyone's.
        runs[-1] += sent - tokens
        parts = _cut(values, runs)
        masks = tuple(
            self._stock.take(whole.identity, own.shape[0], caller, functools.partial(_hash, own))
            for own, (caller, _) in zip(parts, owners, strict=True)
        )
        planes = product.parameters.planes
        made = [
            mask.take(lambda body, own=own: self._transforms.encode(body, own, norm, planes))  # type: ignore[misc]
            for mask, own in zip(masks, parts, strict=True)
        ]
        b, unit = made[0] if len(made) == 1 else map(_side_by_side, zip(*made, strict=True))
        found = []
        for piece, each in zip(pieces, vectors, strict=True):
            part = b if whole.direction == "forward" else _rows(b, piece.rows)
            found.append(Encrypted({"b": part}, EncryptionState(tokens, sent, masks, tuple(runs), unit, part, each)))
        return found

    def check_reply(self, reply: Buffers, state: EncryptionState, piece: LinearMap) -> None:
        """See ``ClientHalf.check_reply``: an equality of integers, before anything is decrypted."""
        y = self.take_reply(reply, state, piece)
        if state.b is None or state.vectors is None:
            return
        if y.shape[1] != state.b.shape[1]:
            raise ReplyError(f"{piece.label}: a value of the reply has {y.shape[1]} bytes")
        if not right(state.vectors, state.b, y):
            raise WrongReplyError(f"{piece.label}: the answer is not the product that was asked for")

    def take_reply(self, reply: Buffers, state: EncryptionState, piece: LinearMap) -> Tensor:
        """See ``ClientHalf.take_reply``: ``y`` (rows, planes, tokens) uint8, still encrypted."""
        y = reply.get("y")
        rows = self._digits * piece.out_features
        if y is None or y.dtype != torch.uint8 or y.dim() != 3 or (y.shape[0], y.shape[2]) != (rows, state.sent):
            got = "nothing" if y is None else f"{y.dtype} {tuple(y.shape)}"
            raise ReplyError(f"{piece.label}: expected uint8 ({rows}, planes, {state.sent}) in the reply, got {got}")
        return y.to(self._device)

    def put_together(
        self, parts: Sequence[Tensor], states: Sequence[EncryptionState], whole: LinearMap, pieces: Sequence[LinearMap]
    ) -> Tensor:
        """See ``ClientHalf.put_together``: the pieces' replies as one ciphertext, decrypted."""
        product, state = self._product(whole), states[0]
        for part in parts:
            if part.shape[1] != product.parameters.planes:
                raise ReplyError(f"{whole.label}: a value of the reply has {part.shape[1]} bytes")
        unit = state.unit
        outputs, first = [], 0
        for mask, run in zip(state.masks, state.runs, strict=True):
            columns = slice(first, first + run)
            own = [part[:, :, columns].contiguous() for part in parts] if len(state.runs) > 1 else parts
            outputs.append(
                mask.reveal(
                    lambda hint, own=own, columns=columns: self._decrypted(  # type: ignore[misc]
                        own, whole, pieces, hint, unit[columns]
                    )
                )
            )
            first += run
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._digits > 1:
            y = torch.add(*y.tensor_split(2, dim=1), alpha=256)
        return y[: state.tokens]

    def decrypt(self, reply: Buffers, state: EncryptionState, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``, of a product in one piece. Raises ``WrongReplyError`` too."""
        self.check_reply(reply, state, linear_map)
        return self.put_together([self.take_reply(reply, state, linear_map)], [state], linear_map, [linear_map])

    def close(self) -> None:
        """Forget masks and hints."""
        self._stock.close()
        self._store.close()
        with self._lock:
            self._prepared.clear()
            self._checks.clear()
        self._public.forget_operands()

    def _decrypted(
        self, parts: Sequence[Tensor], whole: LinearMap, pieces: Sequence[LinearMap], hint: Tensor, unit: Tensor
    ) -> Tensor:
        """Outputs of every digit side by side, (tokens, rows) float32."""
        if whole.direction == "backward" and len(parts) > 1:
            total = lifted(parts[0])
            for part in parts[1:]:
                total.add_(lifted(part))
            return total.sub_(hint).to(torch.float32).mul_(unit).t()
        places = [(part, piece.rows) for part, piece in zip(parts, pieces, strict=True)]
        if whole.direction == "backward":
            places = [(parts[0], ())]
        return self._rows_decrypted(places, whole.out_features, hint, unit)

    def _rows_decrypted(
        self, places: Sequence[tuple[Tensor, tuple[tuple[int, int], ...]]], outputs: int, hint: Tensor, unit: Tensor
    ) -> Tensor:
        """Outputs in the group's order, those of every digit side by side: (tokens, rows) float32."""
        blocks = []
        for part, rows in places:
            first = 0
            for start, stop in rows or ((0, outputs),):
                blocks.append((start, stop, part, first))
                first += stop - start
        count = sum(stop - start for start, stop, *_ in blocks)
        y = torch.empty(hint.shape[1], self._digits * count, dtype=torch.float32, device=self._device)
        row = 0
        for start, stop, part, first in sorted(blocks, key=lambda block: block[0]):
            size, held = stop - start, part.shape[0] // self._digits
            for digit in range(self._digits):
                self._transforms.decrypt(
                    part[digit * held + first : digit * held + first + size],
                    hint[digit * outputs + start : digit * outputs + stop],
                    unit,
                    y[:, digit * count + row : digit * count + row + size],
                )
            row += size
        return y

    def _padded(self, tokens: int) -> int:
        """Tokens that are sent for so many."""
        return -(-tokens // self._pad) * self._pad

    def _product(self, whole: LinearMap) -> Prepared:
        product = self._prepared.get(whole.identity)
        if product is None:
            if self._stock.closed:
                raise SecurityError(f"{whole.label}: the session is closed")
            raise SecurityError(f"{whole.label}: nothing was prepared for this product; its weights were not read")
        return product

    def _found(self, linear_map: LinearMap) -> bool:
        """Whether a product's hints are here, or were found on disk."""
        if linear_map.identity not in self._prepared:
            rows = self._digits * linear_map.out_features
            hints = self._store.find(linear_map.identity, rows, self._parameters(linear_map))
            if hints is not None:
                self._add(linear_map, rows, hints)
        return linear_map.identity in self._prepared

    def _cuts(self, keys: Sequence[str]) -> list[Rows]:
        """The cuts that a group's check vectors allow already."""
        known = self._checks.get(keys[0])
        return [] if known is None else [[(cut, cut)] for cut in known.cuts]

    def _covers(self, keys: Sequence[str], outputs: int, features: int, pieces: Sequence[Rows]) -> bool:
        """Whether check vectors for these pieces are here, or were found on disk."""
        known = self._checks.get(keys[0])
        if known is not None and known.covers(pieces):
            return True
        sizes = outputs, features, self._digits
        cuts = cuts_of(outputs, [*pieces, *self._cuts(keys)])
        content = self._store.find_checks(keys[0], cuts, CheckVectors.nbytes(*sizes, cuts))
        if content is None:
            return False
        vectors = CheckVectors(content[:SEED_BYTES], *sizes, cuts, self._device)
        vectors.load(content[SEED_BYTES:])
        self._add_checks(keys, vectors)
        return True

    def _keep_checks(self, keys: Sequence[str], vectors: CheckVectors) -> None:
        self._store.keep_checks(keys[0], vectors.cuts, vectors.to_bytes())
        self._add_checks(keys, vectors)

    def _add_checks(self, keys: Sequence[str], vectors: CheckVectors) -> None:
        with self._lock:
            self._checks.update(dict.fromkeys(keys, vectors))

    def _vectors(self, whole: LinearMap, piece: LinearMap) -> Vectors | None:
        if not self._check:
            return None
        checks = self._checks.get(whole.identity)
        if checks is None or not checks.covers([piece.rows]):
            raise SecurityError(f"{whole.label}: the answer for rows {list(piece.rows)} could not be checked")
        return checks.forward(piece.rows) if whole.direction == "forward" else checks.backward(piece.rows)

    def _keep(self, linear_map: LinearMap, rows: int, hints: Tensor) -> None:
        """Keep hints that were made, unless one direction's were on disk already."""
        if linear_map.identity not in self._prepared:
            parameters = self._parameters(linear_map)
            self._add(linear_map, rows, self._store.keep(linear_map.identity, rows, parameters, hints))

    def _add(self, linear_map: LinearMap, rows: int, hints: Hints) -> None:
        parameters = self._parameters(linear_map)
        noise = parameters.noise(self._digits)
        prepared = Prepared(parameters, linear_map.in_features, rows, noise, hints)
        with self._lock:
            self._prepared[linear_map.identity] = prepared
            self._bank_columns.clear()

    def _block(self, order: Order, message: bytes) -> Block:
        """Masks under fresh secrets, which are forgotten as soon as the masks are made; see ``hedged_seed``."""
        product = self._prepared.get(order.product)
        if product is None:
            raise SecurityError("the session is closed")
        self._public.forget_operands()
        parameters = product.parameters
        block = Block(product.features, product.rows, order.tokens, self._device)
        secrets = self._transforms.secrets(
            hedged_seed(b"secrets", message), parameters, -(-order.tokens // parameters.degree)
        )
        try:
            for start, stop, public in self._public.parts(product.features, parameters.rank):
                seed = hedged_seed(b"errors", message)
                self._transforms.masks(public, secrets, parameters, seed, block.body.matrix[start:stop])
            for row, hints in product.hints.parts():
                rows = block.hint.matrix[row : row + LANES * len(hints)]
                self._transforms.hint_masks(hints, secrets, parameters, rows)
        finally:
            secrets.zero_()
        return block

    def _block_bytes(self, order: Order) -> int:
        product = self._prepared.get(order.product)
        return 0 if product is None else 4 * order.tokens * (product.features + product.rows)

    def _columns(self, callers: int) -> int:
        """Columns of a bank: as many as the memory for masks allows, had each caller one for every product."""
        if not self._banks:
            return 0
        with self._lock:
            if callers not in self._bank_columns:
                each = 4 * callers * sum(product.features + product.rows for product in self._prepared.values())
                columns = BANK_COLUMNS
                while columns > _FEWEST_BANK_COLUMNS and columns * each > self._mask_bytes:
                    columns //= 2
                self._bank_columns[callers] = columns
            return self._bank_columns[callers]


def _cut(values: Tensor, runs: Sequence[int]) -> Sequence[Tensor]:
    """The tensor in runs of its first dimension; a single one as it is."""
    return [values] if len(runs) == 1 else torch.split(values, list(runs))


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tensors whose last dimension is tokens, as one."""
    return torch.cat(list(parts), dim=-1)


def _hash(values: Tensor) -> bytes:
    return message_hash(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _rows(b: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """The features of a ciphertext that belong to a piece."""
    if not rows:
        return b
    parts: list[Any] = [b[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
