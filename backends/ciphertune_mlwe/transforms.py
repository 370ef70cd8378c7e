"""The arithmetic of masks, encryption and decryption, as tensor operations for any device and as compiled loops.

Both give the same ciphertexts for the same seeds, and the same decryptions up to float32 rounding.
"""

from __future__ import annotations

import abc
import threading

import numpy as np
import torch
from torch import Tensor

from ciphertune_mlwe import native
from ciphertune_mlwe.native.team import Call, spread
from ciphertune_mlwe.params import HINT_PLANES, MODULUS_BITS, ParameterSet
from ciphertune_mlwe.planes import lifted, low_bits, split_bytes
from ciphertune_mlwe.prg import centred_binomial, expand, room, ternary
from ciphertune_mlwe.ring import NegacyclicRing
from ciphertune_mlwe.scratch import Scratch

_NOISE_BYTES = 1 << 18
"""Random bytes of errors that are drawn at a time."""

LANES = 8
"""Rows that stand side by side in a pack of hints."""

DEGREE = 256
"""Of the ring."""


def hint_shape(rows: int, parameters: ParameterSet) -> tuple[int, int, int, int]:
    """The shape of hints of so many rows: packs, n, planes, rows of a pack."""
    return -(-rows // LANES), parameters.dimension, HINT_PLANES, LANES


class Transforms(abc.ABC):
    """Products in the ring on one device. Safe to use from several threads.

    Args:
        device: where tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def secrets(self, seed: bytes, parameters: ParameterSet, blocks: int) -> Tensor:
        """Transforms of fresh ternary secrets, one for each block of ``degree`` tokens, from a seed used once."""
        shape = blocks, parameters.rank, parameters.degree
        values = ternary(seed, shape[0] * shape[1] * shape[2])
        found = torch.from_numpy(values.astype(np.float64)).view(*shape)
        made = self._of_secrets(found)
        values.fill(0)
        found.zero_()
        return made

    @abc.abstractmethod
    def _of_secrets(self, secrets: Tensor) -> Tensor:
        """Transforms of secrets (blocks, rank, degree) float64."""

    @abc.abstractmethod
    def of_rows(self, rows: Tensor, rank: int) -> Tensor:
        """Transforms of ring elements (rows, rank · degree) int32, for ``masks``."""

    @abc.abstractmethod
    def pack(self, values: Tensor, first: int, hints: Tensor) -> None:
        """Round ring elements to their top 24 bits and put them in their place among hints.

        Args:
            values: (rows, n) int32.
            first: row of the hints that the first one goes to.
            hints: (packs, n, 3, 8) uint8, as ``empty_hints``.
        """

    def empty_hints(self, rows: int, parameters: ParameterSet) -> Tensor:
        """Memory for the hints of so many rows, zeros: (packs of 8 rows, n, 3 planes, 8) uint8."""
        return torch.zeros(hint_shape(rows, parameters), dtype=torch.uint8, device=self.device)

    @abc.abstractmethod
    def masks(
        self,
        public: tuple[int, Tensor],
        secrets: Tensor,
        parameters: ParameterSet,
        seed: bytes,
        out: Tensor,
    ) -> None:
        """``⟨a_k, s_j⟩ + e`` mod 2^32.

        Args:
            public: from ``PublicMatrix.transformed``.
            secrets: from ``secrets``.
            parameters: of rank, degree and error.
            seed: 32 bytes that the errors are made from; secret, used once.
            out: (features, tokens) int32 to write to.
        """

    @abc.abstractmethod
    def hint_masks(self, hints: Tensor, secrets: Tensor, parameters: ParameterSet, out: Tensor) -> None:
        """``⟨h_i, s_j⟩`` mod 2^32 into ``out``, (rows, tokens) int32."""

    @abc.abstractmethod
    def encrypt(self, mask: Tensor, x: Tensor, scale: Tensor, planes: int) -> Tensor:
        """``⌊(mask + round(scale · x)) / 2^(32 - 8 planes)⌋``.

        Args:
            mask: (features, tokens) int32, of any strides.
            x: (tokens, features) float32.
            scale: (tokens,) float64.
            planes: bytes kept, from the top.

        Returns:
            (features, planes, tokens) uint8.
        """

    def encode(self, mask: Tensor, x: Tensor, norm: float, planes: int) -> tuple[Tensor, Tensor]:
        """Scale every token to the same Euclidean norm, and ``encrypt``.

        Args:
            mask: as for ``encrypt``.
            x: as for ``encrypt``.
            norm: ``NoiseModel.encoded_norm`` of the map; a token's norm below 1e-30 counts as that.
            planes: as for ``encrypt``.

        Returns:
            What ``encrypt`` gives, and the inverse scales, (tokens,) float32.
        """
        scale = self.norms(x).clamp_min_(1e-30).reciprocal_().mul_(norm)
        return self.encrypt(mask, x, scale, planes), scale.reciprocal().to(torch.float32)

    @abc.abstractmethod
    def decrypt(self, reply: Tensor, mask: Tensor, unit: Tensor, out: Tensor) -> None:
        """``centred(reply lifted to 32 bits - mask) · unit``.

        Args:
            reply: (rows, planes, tokens) uint8.
            mask: (rows, tokens) int32, of any strides.
            unit: (tokens,) float32, what one 2^-32 of the modulus is worth.
            out: (tokens, rows) float32 to write to, tokens of any stride.
        """

    def norms(self, x: Tensor) -> Tensor:
        """Euclidean norms of the tokens of x, (tokens, features) float32: (tokens,) float64."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        return norms


class TensorTransforms(Transforms):
    """Portable tensor operations, in chunks of features that stay in the cache; tensors stay on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._ring = NegacyclicRing(DEGREE, device)
        self._scratch = Scratch(device)
        self._busy = threading.Lock()

    def _of_secrets(self, secrets: Tensor) -> Tensor:
        return self._ring.transform(secrets.to(self.device))

    def of_rows(self, rows: Tensor, rank: int) -> Tensor:
        """See ``Transforms.of_rows``: (rows, rank, degree / 2) complex128."""
        return self._ring.transform(rows.to(self.device, torch.float64).view(len(rows), rank, DEGREE))

    def pack(self, values: Tensor, first: int, hints: Tensor) -> None:
        """See ``Transforms.pack``."""
        rounded = values.to(torch.int64).add_(128).bitwise_right_shift_(8).to(torch.int32)
        planes = torch.empty(len(values), HINT_PLANES, values.shape[1], dtype=torch.uint8, device=self.device)
        split_bytes(rounded, planes)
        rows = torch.arange(first, first + len(values), device=self.device)
        hints[rows // LANES, :, :, rows % LANES] = planes.transpose(1, 2)

    def masks(
        self,
        public: tuple[int, Tensor],
        secrets: Tensor,
        parameters: ParameterSet,
        seed: bytes,
        out: Tensor,
    ) -> None:
        """See ``Transforms.masks``."""
        features, tokens = out.shape
        row_bytes = parameters.error_row_bytes(tokens)
        with self._busy:
            for start, stop in self._chunks(features, len(secrets)):
                values = public[1][start:stop, : parameters.rank]
                body = low_bits(self._ring.inner(values, secrets, self._scratch))[:, :tokens]
                stream = np.empty(room((stop - start) * row_bytes), dtype=np.uint8)
                noise = torch.from_numpy(expand(seed, start, stop - start, row_bytes, stream))
                noise = noise.view(stop - start, row_bytes).to(self.device)
                if parameters.error == "byte":
                    body += noise[:, :tokens]
                else:
                    body += centred_binomial(noise, tokens)
                out[start:stop] = body
            self._scratch.wipe()

    def hint_masks(self, hints: Tensor, secrets: Tensor, parameters: ParameterSet, out: Tensor) -> None:
        """See ``Transforms.hint_masks``."""
        rows, tokens = out.shape
        with self._busy:
            for start, stop in self._chunks(rows, len(secrets)):
                packs = hints[start // LANES : -(-stop // LANES)]
                # Values of the packs' rows, (rows, planes, n), as integers of 24 bits.
                planes = packs.permute(0, 3, 2, 1).reshape(-1, HINT_PLANES, parameters.dimension)[: stop - start]
                values = lifted(planes).bitwise_right_shift_(8).to(torch.float64)
                values = self._ring.transform(values.view(stop - start, parameters.rank, DEGREE))
                mask = low_bits(self._ring.inner(values, secrets, self._scratch))[:, :tokens]
                out[start:stop] = mask.bitwise_left_shift_(8)
            self._scratch.wipe()

    def encrypt(self, mask: Tensor, x: Tensor, scale: Tensor, planes: int) -> Tensor:
        """See ``Transforms.encrypt``."""
        tokens, features = x.shape
        b = torch.empty(features, planes, tokens, dtype=torch.uint8, device=self.device)
        for start, stop in self._chunks(features, -(-tokens // DEGREE)):
            value = low_bits((x[:, start:stop].t().to(torch.float64) * scale).contiguous()).add_(mask[start:stop])
            split_bytes(value.bitwise_right_shift_(MODULUS_BITS - 8 * planes), b[start:stop])
        return b

    def decrypt(self, reply: Tensor, mask: Tensor, unit: Tensor, out: Tensor) -> None:
        """See ``Transforms.decrypt``."""
        torch.mul(lifted(reply).sub_(mask).t(), unit[:, None], out=out)

    def _chunks(self, features: int, blocks: int) -> list[tuple[int, int]]:
        step = max(LANES, min(128, (1 << 17) // (blocks * self._ring.half)) // LANES * LANES)
        return [(start, min(start + step, features)) for start in range(0, features, step)]


class NativeTransforms(Transforms):
    """Compiled loops on the CPU: one pass over every value, rows spread over threads."""

    _CHUNK = 64

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        library = native.library()
        if library is None:
            raise RuntimeError("the native library is not available")
        self._library = library

    def _of_secrets(self, secrets: Tensor) -> Tensor:
        secrets = secrets.contiguous()
        out = torch.empty(*secrets.shape, dtype=torch.float64)
        count = secrets.shape[0] * secrets.shape[1]
        self._library.ct_transform_secrets(native.pointer(secrets), native.pointer(out), count)
        return out

    def of_rows(self, rows: Tensor, rank: int) -> Tensor:
        """See ``Transforms.of_rows``: packs of eight rows, (packs, rank · degree · 8) float64."""
        rows = rows.contiguous()
        packs = -(-len(rows) // LANES)
        out = torch.empty(packs, rank * DEGREE * LANES, dtype=torch.float64)

        def task(start: int, stop: int) -> None:
            self._library.ct_transform_rows(
                native.pointer(rows) + start * rows.shape[1] * 4,
                rank,
                stop - start,
                native.pointer(out) + start * rank * DEGREE * 8,
            )

        native.over_rows(len(rows), LANES, task)
        return out

    def pack(self, values: Tensor, first: int, hints: Tensor) -> None:
        """See ``Transforms.pack``."""
        values = values.contiguous()
        self._library.ct_pack_hints(native.pointer(values), values.shape[1], len(values), first, native.pointer(hints))

    def masks(
        self,
        public: tuple[int, Tensor],
        secrets: Tensor,
        parameters: ParameterSet,
        seed: bytes,
        out: Tensor,
    ) -> None:
        """See ``Transforms.masks``."""
        stored, values = public
        features, tokens = out.shape
        row_bytes = parameters.error_row_bytes(tokens)

        # Some rows at a time, so that their random bytes are read while they are in the cache.
        chunk = min(features, max(self._CHUNK, _NOISE_BYTES // row_bytes // LANES * LANES))
        noise = np.empty(room(chunk * row_bytes), dtype=np.uint8)
        for first in range(0, features, chunk):
            count = min(chunk, features - first)
            expand(seed, first, count, row_bytes, noise)

            def calls(start: int, stop: int, first: int = first) -> list[Call]:
                arguments = (
                    native.pointer(values) + (first + start) * stored * DEGREE * 8,
                    stored,
                    native.pointer(secrets),
                    parameters.rank,
                    tokens,
                    stop - start,
                    noise.ctypes.data + start * row_bytes,
                    row_bytes,
                    int(parameters.error == "binomial"),
                    native.pointer(out) + (first + start) * tokens * 4,
                )
                return [("masks", arguments)]

            spread(self._library, count, LANES, calls)
        noise.fill(0)

    def hint_masks(self, hints: Tensor, secrets: Tensor, parameters: ParameterSet, out: Tensor) -> None:
        """See ``Transforms.hint_masks``."""
        rows, tokens = out.shape

        def calls(start: int, stop: int) -> list[Call]:
            arguments = (
                native.pointer(hints) + start * parameters.dimension * HINT_PLANES,
                native.pointer(secrets),
                parameters.rank,
                tokens,
                stop - start,
                native.pointer(out) + start * tokens * 4,
            )
            return [("hint_masks", arguments)]

        spread(self._library, rows, LANES, calls)

    def encrypt(self, mask: Tensor, x: Tensor, scale: Tensor, planes: int) -> Tensor:
        """See ``Transforms.encrypt``."""
        x, scale = x.contiguous(), scale.contiguous()
        tokens, features = x.shape
        b = torch.empty(features, planes, tokens, dtype=torch.uint8)

        def calls(start: int, stop: int) -> list[Call]:
            arguments = (
                native.pointer(mask) + start * mask.stride(0) * 4,
                mask.stride(0),
                mask.stride(1),
                native.pointer(x) + start * 4,
                features,
                native.pointer(scale),
                tokens,
                stop - start,
                planes,
                native.pointer(b) + start * planes * tokens,
                tokens,
            )
            return [("encrypt", arguments)]

        spread(self._library, features, LANES, calls, tokens * features)
        return b

    def encode(self, mask: Tensor, x: Tensor, norm: float, planes: int) -> tuple[Tensor, Tensor]:
        """See ``Transforms.encode``: of few tokens in one call, for calls take longer than they do."""
        tokens, features = x.shape
        if tokens * features >= native.ALONE:
            return super().encode(mask, x, norm, planes)
        x = native.packed(x)
        b = torch.empty(features, planes, tokens, dtype=torch.uint8)
        unit = torch.empty(tokens, dtype=torch.float32)
        at = mask.data_ptr(), *mask.stride(), x.data_ptr(), x.stride(0)
        self._library.ct_encode(*at, norm, tokens, features, planes, b.data_ptr(), unit.data_ptr())
        return b, unit

    def decrypt(self, reply: Tensor, mask: Tensor, unit: Tensor, out: Tensor) -> None:
        """See ``Transforms.decrypt``."""
        reply, unit = reply.contiguous(), unit.contiguous()
        rows, planes, tokens = reply.shape

        def calls(start: int, stop: int) -> list[Call]:
            arguments = (
                native.pointer(reply) + start * planes * tokens,
                tokens,
                native.pointer(mask) + start * mask.stride(0) * 4,
                mask.stride(0),
                mask.stride(1),
                native.pointer(unit),
                tokens,
                stop - start,
                planes,
                native.pointer(out) + start * 4,
                out.stride(0),
            )
            return [("decrypt", arguments)]

        spread(self._library, rows, LANES, calls, tokens * rows)

    def norms(self, x: Tensor) -> Tensor:
        """See ``Transforms.norms``: in one pass, where torch makes a copy in float64."""
        x = native.packed(x)
        tokens, features = x.shape
        out = torch.empty(tokens, dtype=torch.float64)

        def calls(start: int, stop: int) -> list[Call]:
            arguments = (
                native.pointer(x) + start * x.stride(0) * 4,
                x.stride(0),
                features,
                stop - start,
                native.pointer(out) + start * 8,
            )
            return [("norms", arguments)]

        spread(self._library, tokens, 1, calls, tokens * features)
        return out


def make_transforms(device: torch.device) -> Transforms:
    """The faster ones that work here."""
    if device.type == "cpu" and native.library() is not None:
        return NativeTransforms()
    return TensorTransforms(device)
