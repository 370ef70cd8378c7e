"""Exact integer matrix products, chosen by trying them on this machine rather than by guess. Both halves use them."""

from __future__ import annotations

import abc
import functools
import itertools
import time
from typing import Any

import torch
from torch import Tensor

from ciphertune_mlwe.native import library_for, over_rows, pointer
from ciphertune_mlwe.planes import join_bytes, low_bits

_TRIAL_SECONDS = 0.05
"""After which a slow kernel is timed no more."""

_FEWEST = 2
"""The least that a size must be for a layout to be clear from strides."""


class Kernel(abc.ABC):
    """One way to multiply int8 weights with values mod 2^8P that are given as P byte planes, exactly mod 2^8P."""

    @abc.abstractmethod
    def operand(self, planes: Tensor) -> Tensor:
        """Values in the form that ``multiply`` takes; the first dimension stays that of features.

        Args:
            planes: (K, P, C) uint8, P of 3 or 4, lowest plane first, columns contiguous.
        """

    @abc.abstractmethod
    def multiply(self, weight: Tensor, operand: Tensor, out: Tensor, *, add: bool = False) -> None:
        """``weight · values``, whose low 8P bits are exact.

        Args:
            weight: (N, K) int8, stored row by row or column by column.
            operand: from ``operand``; K features of it.
            out: (N, C) int32, contiguous, to write to.
            add: add to what is there.
        """


class Float64Kernel(Kernel):
    """A portable product: values as they are times weights, in float64, whose sums are integers below 2^51."""

    DEPTH = 1 << 13
    """Features of one product: 2^31 · 2^7 · 2^13 = 2^51."""

    def operand(self, planes: Tensor) -> Tensor:
        """See ``Kernel.operand``: (K, C) float64."""
        return join_bytes(planes)

    def multiply(self, weight: Tensor, operand: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See ``Kernel.multiply``."""
        for start in range(0, weight.shape[1], self.DEPTH):
            part = slice(start, start + self.DEPTH)
            values = torch.mm(weight[:, part].to(torch.float64), operand[part])
            native = library_for(out)
            if native is not None:
                native.ct_low_bits(pointer(values), values.numel(), add, pointer(out))
            elif add:
                out.add_(low_bits(values))
            else:
                out.copy_(low_bits(values))
            add = True


class Int16Kernel(Kernel):
    """Compiled products of values cut into limbs of 16 bits, for processors without byte dot products (AVX2).

    A value of 24 bits is two limbs and one of 32 bits three, where bytes would be three and four.
    """

    _TILE = 4
    _WIDE = 64
    """Columns from which threads share them rather than rows."""

    def operand(self, planes: Tensor) -> Tensor:
        """See ``Kernel.operand``: (K, limbs, C) int16."""
        native = self._library(planes)
        planes = planes if planes.stride(2) == 1 else planes.contiguous()
        rows, count, columns = planes.shape
        out = torch.empty(rows, count - 1, columns, dtype=torch.int16)
        native.ct_limbs(pointer(planes), planes.stride(0), planes.stride(1), count, rows, columns, pointer(out))
        return out

    def multiply(self, weight: Tensor, operand: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See ``Kernel.multiply``."""
        native = self._library(out)
        rows, depth = weight.shape
        _, limbs, columns = operand.shape
        pairs = (depth + 1) // 2
        packed = torch.empty(-(-rows // self._TILE) * self._TILE * pairs * 2, dtype=torch.int16)

        def pack(start: int, stop: int) -> None:
            native.ct_pack_weight(
                pointer(weight) + start * weight.stride(0),
                weight.stride(0),
                weight.stride(1),
                stop - start,
                depth,
                pointer(packed) + 4 * start * pairs,
            )

        def part(first: int, last: int, left: int, right: int) -> None:
            status = native.ct_multiply(
                pointer(packed) + 4 * first * pairs,
                last - first,
                depth,
                pointer(operand) + 2 * left,
                operand.stride(0),
                operand.stride(1),
                limbs,
                right - left,
                add,
                pointer(out) + 4 * (first * out.stride(0) + left),
                out.stride(0),
            )
            if status:
                raise MemoryError("the native product could not allocate its scratch memory")

        over_rows(rows, self._TILE, pack)
        if columns >= self._WIDE:
            over_rows(columns, self._WIDE // 2, lambda left, right: part(0, rows, left, right))
        else:
            over_rows(rows, self._TILE, lambda first, last: part(first, last, 0, columns))

    @staticmethod
    def _library(tensor: Tensor) -> Any:
        native = library_for(tensor)
        if native is None or not native.ct_has_multiply():
            raise NotImplementedError("no compiled product for this processor")
        return native


class Int8Kernel(Kernel):
    """The processor's own int8 product with int32 sums (VNNI, AMX, tensor cores), a product for each plane."""

    DEPTH = 1 << 15
    """Features of one product: 2^15 · 128 · 128 stays inside int32."""

    def operand(self, planes: Tensor) -> Tensor:
        """See ``Kernel.operand``: (K, P, C) int8, 128 less than the bytes, for products of signed numbers."""
        return planes.view(torch.int8).bitwise_xor(-128)

    def multiply(self, weight: Tensor, operand: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See ``Kernel.multiply``."""
        rows, depth = weight.shape
        planes, columns = operand.shape[1:]
        for start in range(0, depth, self.DEPTH):
            part = slice(start, start + self.DEPTH)
            partial = torch.empty(rows, planes * columns, dtype=torch.int32, device=out.device)
            int8_product(weight[:, part], operand[part].reshape(-1, planes * columns), partial)
            sums = weight[:, part].sum(dim=1, dtype=torch.int32)
            native = library_for(out)
            if native is not None:
                native.ct_combine(pointer(partial), pointer(sums), rows, columns, planes, add, pointer(out))
            else:
                if not add:
                    out.zero_()
                for plane in range(planes):
                    values = partial[:, plane * columns : (plane + 1) * columns] + 128 * sums[:, None]
                    out.add_(values.bitwise_left_shift_(8 * plane))
            add = True


def int8_product(w: Tensor, x: Tensor, out: Tensor) -> None:
    """Multiply w (N, K) int8 by x (K, C) int8 into out (N, C) int32, with ``torch._int_mm``."""
    if w.device.type == "cuda":
        # cuBLASLt wants more than 16 rows and multiples of 8 elsewhere.
        _padded_product(w, x, out, max(0, 17 - w.shape[0]), -w.shape[1] % 8, -x.shape[1] % 8)
    elif min(*w.shape, x.shape[1]) < _FEWEST:
        # The stride of a dimension of size 1 says nothing, and libraries read the layout of a matrix from strides.
        _padded_product(w, x, out, *(max(0, _FEWEST - size) for size in (*w.shape, x.shape[1])))
    else:
        torch._int_mm(_plain(w), _plain(x), out=out)


def _padded_product(w: Tensor, x: Tensor, out: Tensor, rows: int, depth: int, columns: int) -> None:
    """The product of copies with so many rows, summands and columns of zeros more, which change no sum."""
    wide = torch.nn.functional.pad(w, (0, depth, 0, rows)).contiguous()
    tall = torch.nn.functional.pad(x, (0, columns, 0, depth)).contiguous()
    out.copy_(torch._int_mm(wide, tall)[: w.shape[0], : x.shape[1]])


def _plain(matrix: Tensor) -> Tensor:
    """The matrix, copied unless it is stored row by row or column by column without overlap."""
    (rows, columns), strides = matrix.shape, matrix.stride()
    plain = (strides[1] == 1 and strides[0] >= columns) or (strides[0] == 1 and strides[1] >= rows)
    return matrix if plain else matrix.contiguous()


KERNELS: dict[str, Kernel] = {"int8": Int8Kernel(), "int16": Int16Kernel(), "float64": Float64Kernel()}


@functools.cache
def choose_kernel(device: torch.device) -> tuple[str, float]:
    """The fastest kernel that is exact here: the fastest first is held against exact products, then the next.

    Returns:
        Its name, and its speed in billions of multiply-adds of whole values a second.
    """
    speeds = {name: speed(kernel, device) for name, kernel in KERNELS.items()}
    for name in sorted(speeds, key=lambda each: -speeds[each]):
        if speeds[name] > 0 and exact(KERNELS[name], device):
            return name, speeds[name]
    raise RuntimeError(f"no product of integers is exact on {device}")


def speed(kernel: Kernel, device: torch.device) -> float:
    """Billions of multiply-adds of whole values a second on a typical shape; 0 where the kernel is missing."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (256, 256), dtype=torch.int8, generator=generator).to(device)
    x = torch.randint(0, 256, (256, 3, 256), dtype=torch.uint8, generator=generator).to(device)
    out = torch.empty(256, 256, dtype=torch.int32, device=device)
    best = float("inf")
    begun = time.perf_counter()
    for _ in range(5):
        start = time.perf_counter()
        if start - begun > _TRIAL_SECONDS:
            break
        try:
            kernel.multiply(w, kernel.operand(x), out)
        except (RuntimeError, AttributeError, NotImplementedError):
            return 0.0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 256**3 / best / 1e9


def exact(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel gives exact products of any sizes in every layout that is in use."""
    generator = torch.Generator().manual_seed(0)
    for rows, depth, columns in (
        *itertools.product((1, 2, 19), (1, 2, 33), (1, 2, 17)),
        (33, 1025, 17),
        (64, 4096, 64),
        (256, 512, 256),
    ):
        w = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
        x = torch.randint(0, 256, (depth, 3, columns), dtype=torch.uint8, generator=generator)
        # Extreme values show kernels that saturate intermediate sums.
        w[0], x[:, :, 0] = -128, 255
        if rows > 1 and columns > 1:
            w[1], x[:, :, 1] = 127, 0
            x[:, 2, 1] = 128
        w, x = w.to(device), x.to(device)
        layouts = [w, w.t().contiguous().t()] if depth > 33 else weight_layouts(w)
        if not all(_exact(kernel, each, x) for each in layouts):
            return False
    return True


def weight_layouts(weight: Tensor) -> list[Tensor]:
    """A weight (N, K) int8 in every layout that products are asked for with.

    Rows in order; the same transposed; and of each a range of the summands.
    """
    rows, depth = weight.shape
    longer = torch.zeros(rows, depth + 3, dtype=torch.int8, device=weight.device)
    longer[:, 2 : 2 + depth] = weight
    part = slice(2, 2 + depth)
    return [weight.contiguous(), weight.t().contiguous().t(), longer[:, part], longer.t().contiguous().t()[:, part]]


def _exact(kernel: Kernel, w: Tensor, x: Tensor) -> bool:
    out = torch.empty(w.shape[0], x.shape[2], dtype=torch.int32, device=w.device)
    expected = w.cpu().to(torch.int64) @ (x.cpu().to(torch.int64) * torch.tensor([1, 256, 65536])[:, None]).sum(1)
    try:
        kernel.multiply(w, kernel.operand(x), out)
        first = bool((((out.cpu().to(torch.int64) - expected) & 0xFFFFFF) == 0).all())
        kernel.multiply(w, kernel.operand(x), out, add=True)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return first and bool((((out.cpu().to(torch.int64) - 2 * expected) & 0xFFFFFF) == 0).all())
