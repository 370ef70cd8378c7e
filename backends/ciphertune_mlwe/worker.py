"""The worker half: integer matrix products with ciphertext. Holds no secret and never imports the client half."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_mlwe.kernels import KERNELS, MAX_DEPTH, Kernel, choose_kernel
from ciphertune_mlwe.native import library, over_rows, pointer
from ciphertune_mlwe.params import PARAMETER_SETS, PLANES
from ciphertune_mlwe.planes import split
from ciphertune_mlwe.prg import SEED_BYTES, expand_exactly
from ciphertune_mlwe.scratch import Scratch

BLOCK_VALUES = 1 << 22
"""Partial sums held at once: 16 MiB."""

REQUEST_BITS = (24, 32)
REPLY_BITS = (16, 24, 32)


@dataclasses.dataclass(frozen=True)
class DigitWeight:
    """A weight as balanced base-256 digits, each (N, K) int8, lowest first.

    Each digit is a product of its own and the client puts the results together: evaluated as one, the larger
    codes would leave the message that much less of the 32 bits.
    """

    digits: tuple[Tensor, ...]


class MLWEWorker(WorkerHalf):
    """Evaluates ``W a`` and ``W b`` mod 2^32 and returns their top digits.

    Args:
        fields: what the client's ``open_fields`` sent.
        device: where products run.

    Raises:
        ProtocolError: the fields are not those of a client of this version.
    """

    def __init__(self, fields: Mapping[str, Any], device: torch.device) -> None:
        name = fields.get("parameters")
        if not isinstance(name, str) or name not in PARAMETER_SETS:
            raise ProtocolError(f"unknown parameter set; known: {', '.join(PARAMETER_SETS)}")
        if fields.get("request_bits") not in REQUEST_BITS or fields.get("reply_bits") not in REPLY_BITS:
            raise ProtocolError(f"request_bits must be one of {REQUEST_BITS} and reply_bits one of {REPLY_BITS}")
        # Clients from before the option expect one precision for the whole reply.
        body_bits = fields.get("body_bits", fields["reply_bits"])
        if body_bits not in REPLY_BITS or body_bits > fields["reply_bits"]:
            raise ProtocolError(f"body_bits must be one of {REPLY_BITS} and not more than reply_bits")
        self._dimension = PARAMETER_SETS[name].dimension
        self._request_planes = int(fields["request_bits"]) // 8
        self._reply_planes = int(fields["reply_bits"]) // 8
        self._body_planes = int(body_bits) // 8
        self._device = device
        self._kernel: Kernel = KERNELS[choose_kernel(device)[0]]
        self._scratch = Scratch(device)
        self._bytes = np.empty(0, dtype=np.uint8)
        self._lock = threading.Lock()

    def prepare(self, weight: Tensor) -> DigitWeight:
        """See ``WorkerHalf.prepare``: int8 codes are used as they are, int16 codes are split into two digits."""
        if weight.dtype == torch.int8:
            return DigitWeight((weight,))
        if weight.dtype != torch.int16:
            raise ProtocolError(f"this backend evaluates int8 and int16 weights, not {weight.dtype}")
        if int(weight.max()) > 127 * 257 or int(weight.min()) < -128 * 257:
            raise ProtocolError("a 16-bit weight code is outside what two balanced digits hold, -32896 to 32639")
        digits = torch.empty(weight.shape[0], 2, weight.shape[1], dtype=torch.int8, device=weight.device)
        split(weight.to(torch.int32), digits, 0)
        return DigitWeight((digits[:, 0], digits[:, 1]))

    def evaluate(self, prepared: DigitWeight, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``.

        Returns:
            ``a`` (rows, planes, n) and ``b`` (rows, planes, tokens) int8, each with as many planes as the client asked
            for; rows are the outputs, once per weight digit.
        """
        digits = prepared.digits if direction == "forward" else tuple(digit.t() for digit in prepared.digits)
        rows, features = digits[0].shape
        seed, b = self._read(request, features)
        shapes = {"a": (self._reply_planes, self._dimension), "b": (self._body_planes, b.shape[2])}
        reply = {
            name: torch.empty(len(digits) * rows, *shape, dtype=torch.int8, device=self._device)
            for name, shape in shapes.items()
        }
        with self._lock:
            public = self._public(seed, features)
            for index, digit in enumerate(digits):
                part = slice(index * rows, (index + 1) * rows)
                self._product(digit, public, reply["a"][part])
                self._product(digit, b, reply["b"][part])
        return reply

    def close(self) -> None:
        """Free scratch memory."""
        with self._lock:
            self._scratch.clear()
            self._bytes = np.empty(0, dtype=np.uint8)

    def _read(self, request: Buffers, features: int) -> tuple[bytes, Tensor]:
        seed, b = request.get("seed"), request.get("b")
        if seed is None or seed.dtype != torch.uint8 or tuple(seed.shape) != (SEED_BYTES,):
            raise ProtocolError(f"expected a buffer 'seed' of {SEED_BYTES} bytes")
        if b is None or b.dtype != torch.int8 or b.dim() != 3:
            raise ProtocolError("expected an int8 buffer 'b' of shape (features, planes, tokens)")
        if tuple(b.shape[:2]) != (features, self._request_planes) or b.shape[2] < 1:
            raise ProtocolError(
                f"buffer 'b' has shape {tuple(b.shape)}, expected ({features}, {self._request_planes}, tokens ≥ 1)"
            )
        return bytes(seed.cpu().numpy().tobytes()), b.to(self._device)

    def _public(self, seed: bytes, features: int) -> Tensor:
        """The public matrix of a seed as planes (features, 4, n) int8: the keystream itself."""
        nbytes = features * PLANES * self._dimension
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes, dtype=np.uint8)
        row_bytes = PLANES * self._dimension

        def task(start: int, stop: int) -> None:
            # Filling writes past its end: the last blocks of a part go through a buffer of their own.
            expand_exactly(seed, start, stop - start, row_bytes, self._bytes[start * row_bytes : stop * row_bytes])

        over_rows(features, 64, task)
        stream = torch.from_numpy(self._bytes[:nbytes])
        return stream.view(torch.int8).view(features, PLANES, self._dimension).to(self._device)

    def _product(self, weight: Tensor, planes: Tensor, out: Tensor) -> None:
        """``W · planes`` mod 2^32, its top digits written to ``out``.

        Args:
            weight: (N, K) int8.
            planes: (K, P, C) int8, the top P of the four digits of a value mod 2^32.
            out: (N, planes kept, C) int8.
        """
        rows, depth = weight.shape
        count, columns = planes.shape[1:]
        # Every product of a digit and a range of features, by the power of 256 it counts, the top one first.
        products = [
            (PLANES - count + j, j, slice(low, low + MAX_DEPTH))
            for j in reversed(range(count))
            for low in range(0, depth, MAX_DEPTH)
        ]
        # One block of columns at a time, so that partial products and their digits stay in the cache.
        step = max(64, (BLOCK_VALUES // (rows * len(products))) // 64 * 64)
        powers = [power for power, *_ in products]
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            partials = self._scratch.get("partials", (len(products), rows, stop - start), torch.int32)
            for partial, (_, j, part) in zip(partials, products, strict=True):
                self._kernel(weight[:, part], planes[part, j, start:stop], partial)
            combine(partials, powers, out[:, :, start:stop])


def combine(partials: Tensor, powers: Sequence[int], out: Tensor) -> None:
    """Top digits of ``Σ partial_p · 256^power_p`` mod 2^32.

    Args:
        partials: (products, rows, columns) int32, contiguous; overwritten.
        powers: per product, each at most the one before it.
        out: (rows, planes, columns) int8, columns contiguous, to write to.
    """
    dropped = PLANES - out.shape[1]
    native = library() if partials.device.type == "cpu" else None
    if native is None:
        total = partials[0]
        for partial, power, above in zip(partials[1:], powers[1:], powers, strict=False):
            # Horner's rule from the top digit down; what passes 2^32 is meant to be lost.
            torch.add(partial, total, alpha=256 ** (above - power), out=total)
        split(total.bitwise_left_shift_(8 * powers[-1]), out, dropped)
        return
    count, rows, columns = partials.shape
    addresses = ctypes.c_void_p * count
    order = (ctypes.c_int64 * count)(*powers)

    def task(start: int, stop: int) -> None:
        inputs = addresses(*(pointer(partial) + 4 * start * columns for partial in partials))
        native.ct_combine(
            ctypes.addressof(inputs),
            ctypes.addressof(order),
            count,
            columns,
            stop - start,
            columns,
            pointer(out) + start * out.stride(0),
            out.stride(0),
            out.stride(1),
            out.shape[1],
            dropped,
        )

    over_rows(rows, 16, task)
