"""Products of the mlwe backend: every kernel against exact integers, and which one is chosen."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ciphertune.backend import Direction
from ciphertune.errors import ConfigError
from ciphertune_mlwe import kernels, native, worker
from ciphertune_mlwe.kernels import KERNELS, Float64Kernel, Int8Kernel, Kernel, NativeKernel, choose_kernel
from ciphertune_mlwe.native import team

pytestmark = pytest.mark.usefixtures("two_threads")
CPU = torch.device("cpu")
NATIVE = [name for name, kernel in KERNELS.items() if isinstance(kernel, NativeKernel)]
TORCH = [name for name in KERNELS if name not in NATIVE]
SOURCE = Path(native.__file__).with_name("product.c")


def here(name: str) -> Kernel:
    """A kernel, or a skipped test where this machine lacks it."""
    if name in NATIVE and (native.library() is None or name not in native.products(native.library())):
        pytest.skip(f"this machine has no {name} product")
    return KERNELS[name]


def chosen_beside(other: Kernel, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel is chosen where the other is the fastest."""
    monkeypatch.setattr(kernels, "KERNELS", {"other": other, "torch-float64": KERNELS["torch-float64"]})
    monkeypatch.setattr(kernels, "speeds", lambda device: {"other": 2.0, "torch-float64": 1.0})
    name: str = choose_kernel.__wrapped__(CPU)[0]
    return name


@functools.cache
def int8_here() -> bool:
    """Whether this torch has an int8 product for the CPU; older releases have none."""
    return "torch-int8" in kernels.speeds(CPU)


def test_of_kernels_that_are_about_as_fast_the_first_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, name in (
        ({"avx512-vnni": 85.0, "avx2": 100.0, "portable": 9.0}, "avx512-vnni"),
        ({"avx512-vnni": 60.0, "avx2": 100.0, "portable": 90.0}, "avx2"),
    ):
        monkeypatch.setattr(kernels, "speeds", lambda device, found=found: found)
        monkeypatch.setattr(kernels, "exact", lambda kernel, device: True)
        assert choose_kernel.__wrapped__(CPU) == (name, found[name])


def test_a_faster_kernel_that_is_exact_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_beside(Float64Kernel(), monkeypatch) == "other"


def test_a_kernel_that_is_missing_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Float64Kernel):
        def multiply(self, weight: torch.Tensor, planes: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
            raise NotImplementedError

    monkeypatch.setattr(kernels, "KERNELS", {"missing": Missing(), "torch-float64": KERNELS["torch-float64"]})
    assert list(kernels.speeds(CPU)) == ["torch-float64"]
    assert choose_kernel.__wrapped__(CPU)[0] == "torch-float64"


def test_the_chosen_kernel_is_exact_and_a_saturating_one_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    name, speed = choose_kernel(CPU)
    assert name in KERNELS
    assert speed > 0

    class Saturating(Int8Kernel):
        """What processors without a dot-product instruction do: pairs of products saturate at 16 bits."""

    def saturating(w: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        w, x = w.long(), x.long()
        if w.shape[1] % 2:
            w, x = torch.nn.functional.pad(w, (0, 1)), torch.nn.functional.pad(x, (0, 0, 0, 1))
        pairs = w[:, 0::2, None] * x[None, 0::2] + w[:, 1::2, None] * x[None, 1::2]
        out.copy_(pairs.clamp(-32768, 32767).sum(1))

    monkeypatch.setattr(kernels, "int8_product", saturating)
    assert chosen_beside(Saturating(), monkeypatch) == "torch-float64"


@pytest.mark.parametrize("wrong", [(1, 5), (5, 1), "transposed", "apart"])
def test_a_kernel_that_errs_on_a_layout_in_use_is_never_chosen(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Errs(Float64Kernel):
        def multiply(self, weight: torch.Tensor, planes: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
            super().multiply(weight, planes, out, add=add)
            (rows, depth), (along, across) = weight.shape, weight.stride()
            layout = "transposed" if along == 1 < min(across, rows, depth) else ""
            layout = "apart" if along > depth > 1 == across else layout
            if wrong == layout or wrong == (min(rows, 5), min(depth, 5)):
                out.add_(1)

    assert chosen_beside(Errs(), monkeypatch) == "torch-float64"


def test_a_kernel_that_does_not_add_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwrites(Float64Kernel):
        def multiply(self, weight: torch.Tensor, planes: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
            super().multiply(weight, planes, out)

    assert chosen_beside(Overwrites(), monkeypatch) == "torch-float64"


def test_a_kernel_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIPHERTUNE_KERNEL", "torch-float64")
    assert choose_kernel.__wrapped__(CPU)[0] == "torch-float64"
    monkeypatch.setenv("CIPHERTUNE_KERNEL", "abacus")
    with pytest.raises(ConfigError, match=r"'abacus' is no kernel; .* this machine has .*torch-float64"):
        choose_kernel.__wrapped__(CPU)
    monkeypatch.setattr(kernels, "speeds", lambda device: {"torch-float64": 1.0})
    monkeypatch.setenv("CIPHERTUNE_KERNEL", "amx")
    with pytest.raises(ConfigError, match=r"'amx' is not available; .* this machine has torch-float64$"):
        choose_kernel.__wrapped__(CPU)
    monkeypatch.setattr(kernels, "exact", lambda kernel, device: False)
    monkeypatch.setenv("CIPHERTUNE_KERNEL", "torch-float64")
    with pytest.raises(ConfigError, match="is not exact"):
        choose_kernel.__wrapped__(CPU)


def confused(w: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """What torch's product is where it misreads strides: of a (1, K) matrix with strides (1, 1), for one."""
    out = torch.empty(w.shape[0], x.shape[1], dtype=torch.int32) if out is None else out
    for matrix in (w, x):
        (rows, columns), strides = matrix.shape, matrix.stride()
        clear = strides in ((max(strides[0], columns), 1), (1, max(strides[1], rows)))
        if min(rows, columns) < 2 or not clear:
            return out.fill_(1 << 20)
    return out.copy_(w.long() @ x.long())


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int) -> torch.Tensor:
    """An int8 matrix of any strides: rows and columns in order, transposed, apart, repeated."""
    base = torch.randint(-128, 128, (512,), dtype=torch.int8, generator=torch.Generator().manual_seed(rows + columns))
    step, apart = st.integers(0, 3), st.integers(0, 20)
    strides = draw(st.tuples(apart, step) | st.tuples(step, apart))
    return base.as_strided((rows, columns), strides, draw(st.integers(0, 7)))


def values_of(b: torch.Tensor) -> torch.Tensor:
    """Values of byte planes (rows, planes, columns), int64."""
    return (b.long() * (256 ** torch.arange(b.shape[1]))[:, None]).sum(1)


def hold_exact(kernel: Kernel, w: torch.Tensor, b: torch.Tensor) -> None:
    """Compare a product, and the same added to it, and its bytes with exact ones mod 2^8P."""
    out = torch.full((len(w), b.shape[2]), 7, dtype=torch.int32)
    kernel.multiply(w, b, out)
    first = out.long().clone()
    kernel.multiply(w, b, out, add=True)
    y = torch.full((len(w), *b.shape[1:]), 7, dtype=torch.uint8)
    kernel.product(w, b, y)
    want = w.long() @ values_of(b)
    modulus = 2 ** (8 * b.shape[1])
    for found, times in ((first, 1), (out.long(), 2), (values_of(y), 1)):
        assert torch.equal((found - times * want) % modulus, torch.zeros_like(want))


def some_product(data: st.DataObject, most: int = 1 << 30) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in either layout and values, both with extreme ones among them."""
    sizes = st.integers(1, 9) | st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 95, 96, 97, 130, 193])
    rows, columns = data.draw(sizes), data.draw(sizes)
    depth = data.draw(sizes | st.sampled_from([511, 512, 513, 1025, 1600]).filter(lambda size: size <= most))
    count = data.draw(st.sampled_from([3, 4]))
    w = torch.randint(-128, 128, (rows, depth + 3), dtype=torch.int8)[:, 2 : 2 + depth]
    if data.draw(st.booleans()):
        w = w.t().contiguous().t()
    b = torch.randint(0, 256, (depth, count, columns + 2), dtype=torch.uint8)[:, :, 1 : columns + 1]
    extreme = data.draw(st.sampled_from([0, 127, 128, 255]))
    w[0], w[:, 0], b[:, :, 0], b[0] = data.draw(st.sampled_from([-128, 127])), -128, extreme, 255
    return w, b


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=80)
@given(st.data())
def test_compiled_products_are_exact_for_any_sizes_and_layouts(name: str, data: st.DataObject) -> None:
    kernel = here(name)
    with pytest.MonkeyPatch.context() as patch:
        # Small products run on one thread otherwise.
        patch.setattr(NativeKernel, "_ALONE", data.draw(st.sampled_from([0, 1 << 23])))
        hold_exact(kernel, *some_product(data))


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=30)
@given(st.data())
def test_compiled_products_take_any_strides(name: str, data: st.DataObject) -> None:
    kernel = here(name)
    rows, depth, columns = (data.draw(st.integers(1, 12)) for _ in range(3))
    b = torch.randint(0, 256, (depth, 3, 2 * columns), dtype=torch.uint8)
    hold_exact(kernel, data.draw(matrices(rows, depth)), b[:, :, :: data.draw(st.integers(1, 2))])


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled products with plain loops for the instructions that machines may lack."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform == "win32":
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("native") / "emulated.so"
    flags = ["-O2", "-std=c11", "-fPIC", "-shared", "-Wno-psabi", "-DCT_EMULATE"]
    subprocess.run([*compiler.split(), *flags, str(SOURCE), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    native.declare(library, "product")
    return library


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_products_of_other_machines_are_exact_with_their_instructions_emulated(
    name: str, emulated: ctypes.CDLL, data: st.DataObject
) -> None:
    if name not in native.products(emulated):
        pytest.skip(f"{name} is of another architecture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library_for", lambda tensor: emulated)
        # The emulated tile registers are shared by threads.
        patch.setattr(NativeKernel, "_ALONE", 1 << 62)
        hold_exact(KERNELS[name], *some_product(data))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", TORCH)
@settings(max_examples=40)
@given(st.data())
def test_products_of_torch_are_exact_for_any_sizes_and_strides(name: str, portable: bool, data: st.DataObject) -> None:
    rows, depth, columns = (data.draw(st.integers(1, 12)) for _ in range(3))
    count = data.draw(st.sampled_from([3, 4]))
    w = data.draw(matrices(rows, depth))
    b = torch.randint(0, 256, (depth, count, columns + 2), dtype=torch.uint8)[:, :, 1 : columns + 1]
    kernel = KERNELS[name]
    with pytest.MonkeyPatch.context() as patch:
        # Older releases of torch have no int8 product for the CPU: there the stand-in is always used.
        if not int8_here() or data.draw(st.booleans()):
            patch.setattr(torch, "_int_mm", confused)
        if portable:
            patch.setattr(native, "library", lambda: None)
        patch.setattr(type(kernel), "DEPTH", data.draw(st.sampled_from([5, 1 << 13])))
        patch.setattr(kernels, "BLOCK_VALUES", 1)
        hold_exact(kernel, w, b)


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=20)
@given(st.data())
def test_products_in_parts_are_those_of_the_whole(name: str, data: st.DataObject) -> None:
    kernel = here(name)
    w, b = some_product(data)
    whole, found = (torch.full((len(w), *b.shape[1:]), 7, dtype=torch.uint8) for _ in range(2))
    kernel.product(w, b, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeKernel, "_ROWS", data.draw(st.sampled_from([1, 32])))
        patch.setattr(NativeKernel, "_ALONE", data.draw(st.sampled_from([0, 1 << 23])))
        parts = kernel.parts(len(w), w.shape[1], b.shape[2], data.draw(st.sampled_from([1, 1 << 16])))
    for rows, columns in parts:
        kernel.product(w[rows], b[:, :, columns], found[rows, :, columns])
    assert torch.equal(found, whole)


def test_long_products_pause() -> None:
    half = worker.MLWEWorker({}, CPU)
    half._kernel, half._part = KERNELS["portable"], 1
    weight = torch.randint(-127, 128, (900, 8), dtype=torch.int8)
    pauses: list[int] = []
    b = torch.randint(0, 256, (8, 3, 1200), dtype=torch.uint8)
    reply = half.evaluate_in_parts((weight,), "forward", {"b": b}, lambda: pauses.append(1))
    assert torch.equal(reply["y"], half.evaluate((weight,), "forward", {"b": b})["y"])
    assert len(pauses) == 5, "three blocks of rows, two of columns"


@pytest.mark.parametrize("columns", [2, 17])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_sums_of_extreme_values_stay_exact(name: str, transposed: bool, columns: int) -> None:
    kernel = here(name)
    depth = (1 << 16) + 3
    w = torch.full((2, depth), -128, dtype=torch.int8)
    w[1] = 127
    if transposed:
        w = w.t().contiguous().t()
    for count in (3, 4):
        b = torch.full((depth, count, columns), 255, dtype=torch.uint8)
        b[:, :, 1] = torch.tensor([0, 0, 0, 128][4 - count :], dtype=torch.uint8)
        with pytest.MonkeyPatch.context() as patch:
            if not int8_here():
                patch.setattr(torch, "_int_mm", confused)
            hold_exact(kernel, w, b)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=20)
@given(st.data())
def test_evaluation_is_exact_for_any_sizes(
    name: str, weight_bits: int, count: int, direction: Direction, data: st.DataObject
) -> None:
    rows, features, tokens = (data.draw(st.sampled_from([1, 2, 3, 17, 131])) for _ in range(3))
    dtype, top = (torch.int8, 127) if weight_bits == 8 else (torch.int16, 32639)
    weight = torch.randint(-top, top + 1, (rows, features), dtype=dtype)
    weight[0], weight[:, 0] = top, -top
    half = worker.MLWEWorker({}, CPU)
    matrix = weight if direction == "forward" else weight.t()
    b = torch.randint(0, 256, (matrix.shape[1], count, tokens), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "_kernel", here(name))
        patch.setattr(torch, "_int_mm", confused)
        reply = half.evaluate(half.prepare(weight), direction, {"b": b})
    got = values_of(reply["y"])
    if weight_bits == 16:
        got = got[: len(matrix)] + 256 * got[len(matrix) :]
    want = matrix.long() @ values_of(b)
    assert reply["y"].shape == (weight_bits // 8 * len(matrix), count, tokens)
    assert torch.equal((got - want) % 2 ** (8 * count), torch.zeros_like(want))


@pytest.mark.parametrize("openmp", [True, False])
def test_loops_give_the_same_on_threads_of_torch_and_on_our_own(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    if library is None:
        pytest.skip("the loops are not compiled here")
    if openmp and team._openmp(library) is None:
        pytest.skip("torch has no OpenMP library of GNU here")
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda library: None)
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (300, 200), dtype=torch.int8, generator=generator)
    b = torch.randint(0, 256, (200, 3, 333), dtype=torch.uint8, generator=generator)
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(native, "thread_count", lambda threads=threads: threads)
        hold_exact(KERNELS[choose_kernel(CPU)[0]], w, b)


def test_a_loop_without_memory_is_an_error_on_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    if library is None or team._openmp(library) is None:
        pytest.skip("torch has no OpenMP library of GNU here")
    monkeypatch.setattr(native, "thread_count", lambda: 2)
    failing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda arguments: 1)
    monkeypatch.setattr(team, "_address", lambda library, name: ctypes.cast(failing, ctypes.c_void_p).value)
    with pytest.raises(MemoryError):
        team.spread(library, 64, 8, lambda first, last: [("norms", (first, last))])
