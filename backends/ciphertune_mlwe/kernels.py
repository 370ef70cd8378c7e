"""Exact integer matrix products, chosen by trying them on this machine rather than by guess. Both halves use them."""

from __future__ import annotations

import abc
import functools
import itertools
import os
import time

import torch
from torch import Tensor

from ciphertune.errors import ConfigError
from ciphertune_mlwe.native import ALONE, library_for, packed, pointer, products, thread_count
from ciphertune_mlwe.native.team import Call, spread
from ciphertune_mlwe.planes import join_bytes, low_bits, split_bytes

_TRIAL_SIZE = 256
"""Rows, features and columns of the products that kernels are timed with."""

_TRIALS = 8
"""Timed products of a kernel."""

_TRIAL_SECONDS = 0.05
"""After which a slow kernel is timed no more."""

_AS_FAST = 0.8
"""Share of the fastest kernel's speed from which another one is taken for as fast."""

BLOCK_VALUES = 1 << 21
"""Sums held at once."""

_PACKED = 1 << 21
"""Bytes of packed values that the compiled code aims at (``VALUES`` of ``native/product.c``)."""

_FEWEST = 2
"""The least that a size must be for a layout to be clear from strides."""


class Kernel(abc.ABC):
    """One way to multiply int8 weights with values mod 2^8P that are given as P byte planes, exactly mod 2^8P."""

    @abc.abstractmethod
    def multiply(self, weight: Tensor, planes: Tensor, out: Tensor, *, add: bool = False) -> None:
        """``weight · values``, whose low 8P bits are exact.

        Args:
            weight: (N, K) int8, stored row by row or column by column.
            planes: (K, P, C) uint8, P of 3 or 4, lowest plane first, columns contiguous.
            out: (N, C) int32, contiguous, to write to.
            add: add to what is there.
        """

    def product(self, weight: Tensor, planes: Tensor, out: Tensor) -> None:
        """``weight · values`` as byte planes.

        Args:
            weight: as for ``multiply``.
            planes: as for ``multiply``.
            out: (N, P, C) uint8 to write to: contiguous, or some rows and columns of what is.
        """
        rows, columns = weight.shape[0], planes.shape[2]
        # One block of columns at a time, so that sums stay in the cache.
        step = max(64, BLOCK_VALUES // rows // 64 * 64)
        for start in range(0, columns, step):
            block = slice(start, start + step)
            sums = torch.empty(rows, min(step, columns - start), dtype=torch.int32, device=out.device)
            self.multiply(weight, planes[:, :, block], sums)
            split_bytes(sums, out[:, :, block])

    def parts(self, rows: int, depth: int, columns: int, work: int) -> list[tuple[slice, slice]]:
        """Rows and columns of a product that are computed at a time, where parts cost little; otherwise all of them.

        Args:
            rows: of the product, N.
            depth: K.
            columns: C.
            work: multiply-adds of a part, about.
        """
        return [(slice(0, rows), slice(0, columns))]


class NativeKernel(Kernel):
    """A compiled product for some processors, from planes to planes in one pass (``native/product.c``).

    Args:
        name: what the compiled code calls it.
    """

    _ALONE = 1 << 23
    """Multiply-adds below which waking another thread takes longer than it saves."""
    _MULTIPLE = 16
    _ROWS = 512
    """Rows of a part at least, for each of which all values are packed again: about 0.05 of its time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def multiply(self, weight: Tensor, planes: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See ``Kernel.multiply``."""
        self._run(weight, planes, out, 0, add)

    def product(self, weight: Tensor, planes: Tensor, out: Tensor) -> None:
        """See ``Kernel.product``."""
        self._run(weight, planes, out, planes.shape[1], False)

    def parts(self, rows: int, depth: int, columns: int, work: int) -> list[tuple[slice, slice]]:
        """See ``Kernel.parts``: columns as the compiled code takes them at a time, then rows."""
        wide = min(max(64, _PACKED // (4 * depth) // 16 * 16), 512) * thread_count()
        width = max(1, work // (rows * depth * wide)) * wide
        height = max(self._ROWS, work // (depth * min(width, columns)) // self._ROWS * self._ROWS)
        return [
            (slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))
            for column in range(0, columns, width)
            for row in range(0, rows, height)
        ]

    def _run(self, weight: Tensor, planes: Tensor, out: Tensor, out_planes: int, add: bool) -> None:
        """Write ``out`` as so many byte planes or, of none, as int32."""
        native = library_for(out)
        which = None if native is None else products(native).get(self._name)
        if native is None or which is None:
            raise NotImplementedError(f"no {self._name} product here")
        weight = _plain(weight)
        planes = packed(planes)
        rows, depth = weight.shape
        count, columns = planes.shape[1:]

        def part(first: int, last: int, left: int, right: int) -> list[Call]:
            target = pointer(out) + first * out.stride(0) * out.element_size() + left * out.element_size()
            arguments = (
                which,
                pointer(weight) + first * weight.stride(0),
                weight.stride(0),
                weight.stride(1),
                last - first,
                depth,
                pointer(planes) + left,
                planes.stride(0),
                planes.stride(1),
                count,
                right - left,
                target if out_planes else 0,
                out.stride(-2),
                0 if out_planes else target,
                out.stride(-2),
                int(add),
            )
            return [("product", arguments)]

        alone = rows * depth * columns < self._ALONE
        # A part of the rows packs all values again, one of the columns expands all weights again: values take longer.
        if alone or 4 * columns < rows:
            values = 0 if alone else ALONE
            spread(native, rows, self._MULTIPLE, lambda first, last: part(first, last, 0, columns), values)
        else:
            spread(native, columns, self._MULTIPLE, lambda left, right: part(0, rows, left, right))


class Float64Kernel(Kernel):
    """A portable product: values as they are times weights, in float64, whose sums are integers below 2^51."""

    DEPTH = 1 << 13
    """Features of one product: 2^31 · 2^7 · 2^13 = 2^51."""

    def multiply(self, weight: Tensor, planes: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See ``Kernel.multiply``."""
        for start in range(0, weight.shape[1], self.DEPTH):
            part = slice(start, start + self.DEPTH)
            values = torch.mm(weight[:, part].to(torch.float64), join_bytes(planes[part]))
            native = library_for(out)
            if native is not None:
                native.ct_low_bits(pointer(values), values.numel(), add, pointer(out))
            elif add:
                out.add_(low_bits(values))
            else:
                out.copy_(low_bits(values))
            add = True


class Int8Kernel(Kernel):
    """Torch's int8 product with int32 sums (tensor cores; on processors VNNI or AMX), a product for each plane."""

    DEPTH = 1 << 15
    """Features of one product: 2^15 · 128 · 128 stays inside int32."""

    def multiply(self, weight: Tensor, planes: Tensor, out: Tensor, *, add: bool = False) -> None:
        """See ``Kernel.multiply``."""
        rows, depth = weight.shape
        count, columns = planes.shape[1:]
        for start in range(0, depth, self.DEPTH):
            part = slice(start, start + self.DEPTH)
            # 128 less than the bytes, for a product of signed numbers.
            values = planes[part].view(torch.int8).bitwise_xor(-128).reshape(-1, count * columns)
            partial = torch.empty(rows, count * columns, dtype=torch.int32, device=out.device)
            int8_product(weight[:, part], values, partial)
            sums = weight[:, part].sum(dim=1, dtype=torch.int32)
            native = library_for(out)
            if native is not None:
                native.ct_combine(pointer(partial), pointer(sums), rows, columns, count, add, pointer(out))
            else:
                if not add:
                    out.zero_()
                for plane in range(count):
                    each = partial[:, plane * columns : (plane + 1) * columns] + 128 * sums[:, None]
                    out.add_(each.bitwise_left_shift_(8 * plane))
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


KERNELS: dict[str, Kernel] = {
    **{name: NativeKernel(name) for name in ("amx", "avx512-vnni", "avx-vnni", "avx2", "neon", "portable")},
    "torch-int8": Int8Kernel(),
    "torch-float64": Float64Kernel(),
}


@functools.cache
def choose_kernel(device: torch.device) -> tuple[str, float]:
    """The fastest kernel that is exact here: the fastest first is held against exact products, then the next.

    Of kernels that are about as fast the first of ``KERNELS`` is taken, so that what else the machine does has no say.
    ``CIPHERTUNE_KERNEL`` names the one to use instead.

    Returns:
        Its name, and its speed in billions of multiply-adds of whole values a second.

    Raises:
        ConfigError: the kernel that was asked for is unknown, missing or not exact here.
    """
    wanted = os.environ.get("CIPHERTUNE_KERNEL")
    found = speeds(device)
    here = _by_speed(found)
    for name in here if not wanted else [wanted] if wanted in here else []:
        if exact(KERNELS[name], device):
            return name, found[name]
    if wanted:
        reason = "is not exact" if wanted in here else "is not available" if wanted in KERNELS else "is no kernel"
        raise ConfigError(
            f"CIPHERTUNE_KERNEL: {wanted!r} {reason}; for products on {device} this machine has {', '.join(here)}"
        )
    raise RuntimeError(f"no product of integers is exact on {device}")


def _by_speed(found: dict[str, float]) -> list[str]:
    """The names of kernels, the fastest first; those that are about as fast in the order that they have."""
    left, ordered = list(found), []
    while left:
        least = _AS_FAST * max(found[name] for name in left)
        ordered.append(next(name for name in left if found[name] >= least))
        left.remove(ordered[-1])
    return ordered


def speeds(device: torch.device) -> dict[str, float]:
    """Billions of multiply-adds of whole values a second on a typical shape, of every kernel that is there.

    Kernels take turns, so that what disturbs one disturbs the others, and the best of each counts.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (_TRIAL_SIZE, _TRIAL_SIZE), dtype=torch.int8, generator=generator).to(device)
    x = torch.randint(0, 256, (_TRIAL_SIZE, 3, _TRIAL_SIZE), dtype=torch.uint8, generator=generator).to(device)
    out = torch.empty(_TRIAL_SIZE, 3, _TRIAL_SIZE, dtype=torch.uint8, device=device)
    best: dict[str, float] = {}
    spent = dict.fromkeys(KERNELS, 0.0)
    for turn in range(_TRIALS + 1):
        for name in list(spent):
            start = time.perf_counter()
            try:
                KERNELS[name].product(w, x, out)
            except (RuntimeError, AttributeError, NotImplementedError):
                del spent[name]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            spent[name] += seconds
            # The first turn wakes threads and fetches memory, and counts for those that are too slow for another.
            best[name] = seconds if turn <= 1 else min(seconds, best[name])
            if spent[name] > _TRIAL_SECONDS:
                del spent[name]
    return {name: _TRIAL_SIZE**3 / best[name] / 1e9 for name in KERNELS if name in best}


def exact(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel gives exact products of any sizes in every layout that is in use."""
    generator = torch.Generator().manual_seed(0)
    for rows, depth, columns, planes in (
        *itertools.product((1, 2, 19), (1, 2, 33), (1, 2, 17), (3,)),
        (35, 67, 5, 4),
        (33, 1025, 17, 4),
        (64, 4096, 64, 3),
        (256, 512, 256, 3),
    ):
        w = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
        x = torch.randint(0, 256, (depth, planes, columns), dtype=torch.uint8, generator=generator)
        # Extreme values show kernels that saturate intermediate sums.
        w[0], x[:, :, 0] = -128, 255
        if rows > 1 and columns > 1:
            w[1], x[:, :, 1] = 127, 0
            x[:, planes - 1, 1] = 128
        w, x = w.to(device), x.to(device)
        layouts = [w, w.t().contiguous().t()] if depth > 67 else weight_layouts(w)
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
    planes, columns = x.shape[1:]
    out = torch.empty(w.shape[0], columns, dtype=torch.int32, device=w.device)
    y = torch.empty(w.shape[0], planes, columns, dtype=torch.uint8, device=w.device)
    scale = 256 ** torch.arange(planes)[:, None]
    # In float64, which is exact here and much faster than int64.
    values = (x.cpu().to(torch.int64) * scale).sum(1).to(torch.float64)
    expected = (w.cpu().to(torch.float64) @ values).to(torch.int64)
    mask = (1 << 8 * planes) - 1

    def right(found: Tensor, times: int) -> bool:
        return bool((((found.cpu().to(torch.int64) - times * expected) & mask) == 0).all())

    try:
        kernel.product(w, x, y)
        kernel.multiply(w, x, out)
        first = right(out, 1)
        kernel.multiply(w, x, out, add=True)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return first and right(out, 2) and right((y.cpu().to(torch.int64) * scale).sum(1), 1)
