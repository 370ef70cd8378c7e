"""The exact arithmetic under the mlwe backend: ring, bytes, products, samplers, and what the worker does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ciphertune.backend import Direction
from ciphertune.errors import ProtocolError
from ciphertune_mlwe import MLWEBackend, kernels, native, planes, worker
from ciphertune_mlwe.kernels import KERNELS, Float64Kernel, Int8Kernel, Kernel, choose_kernel
from ciphertune_mlwe.params import WIDE
from ciphertune_mlwe.planes import low_bits
from ciphertune_mlwe.prg import Keystream, centred_binomial, expand, room, ternary
from ciphertune_mlwe.ring import NegacyclicRing
from ciphertune_mlwe.scratch import Scratch

pytestmark = pytest.mark.usefixtures("two_threads")
CPU = torch.device("cpu")
INT32 = st.integers(-(2**31), 2**31 - 1)


def folded(coefficients: np.ndarray) -> np.ndarray:
    """Coefficients of a polynomial in the order the ring keeps them."""
    half = len(coefficients) // 2
    return np.stack([coefficients[:half], coefficients[half:]], axis=1).reshape(-1)


def negacyclic(a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Schoolbook product modulo X^d + 1 in exact integers."""
    d = len(a)
    full = np.zeros(2 * d, dtype=object)
    for i, value in enumerate(s):
        if value:
            full[i : i + d] += int(value) * a.astype(object)
    return (full[:d] - full[d:]).astype(np.int64)


@pytest.mark.parametrize("degree", [4, 64, 256])
@pytest.mark.parametrize("extreme", [False, True])
def test_inner_products_equal_schoolbook_multiplication(degree: int, extreme: bool) -> None:
    rng = np.random.default_rng(degree)
    rank, features, blocks = 5, 3, 2
    a = rng.integers(-(2**31), 2**31, size=(features, rank, degree))
    s = rng.integers(-1, 2, size=(blocks, rank, degree))
    if extreme:
        a[:], s[:] = -(2**31), 1
        s[:, :, ::2] = -1
    ring = NegacyclicRing(degree, CPU)

    def prepared(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.apply_along_axis(folded, -1, values)).to(torch.float64)

    got = ring.inner(ring.transform(prepared(a)), ring.transform(prepared(s)), Scratch(CPU))
    want = [
        [folded(np.sum([negacyclic(a[k, r], s[j, r]) for r in range(rank)], axis=0)) for j in range(blocks)]
        for k in range(features)
    ]
    assert torch.equal(got.round().to(torch.int64), torch.tensor(np.array(want)).view(features, -1))
    assert (got - got.round()).abs().max() < 0.05


@pytest.mark.parametrize("count", [3, 4])
@given(st.lists(INT32, min_size=1, max_size=40))
def test_bytes_are_unsigned_and_come_back_centred(count: int, values: list[int]) -> None:
    for portable in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if portable:
                patch.setattr(native, "library", lambda: None)
            out = torch.empty(1, count, len(values), dtype=torch.uint8)
            planes.split_bytes(torch.tensor([values], dtype=torch.int32), out)
            back = planes.join_bytes(out)[0].tolist()
        for value, found, byte in zip(values, back, out[0].t().tolist(), strict=True):
            assert byte == list((value % 2 ** (8 * count)).to_bytes(count, "little"))
            assert (found - value) % 2 ** (8 * count) == 0
            assert -(2 ** (8 * count - 1)) <= found < 2 ** (8 * count - 1)
        top = planes.lifted(out)[0].tolist()
        assert [(t - (v << (32 - 8 * count))) % 2**32 for t, v in zip(top, values, strict=True)] == [0] * len(values)


@given(st.lists(st.integers(-32639, 32639), min_size=1, max_size=40))
def test_codes_of_sixteen_bits_are_two_digits(values: list[int]) -> None:
    low, high = planes.digits_of(torch.tensor([values], dtype=torch.int16))
    assert (low.long() + 256 * high.long())[0].tolist() == values
    eight = torch.tensor([[5, -7]], dtype=torch.int8)
    assert planes.digits_of(eight)[0] is eight


@given(st.integers(-(2**50), 2**50), st.sampled_from([0.0, 0.25, -0.25, 0.49]))
def test_low_bits_rounds_and_wraps(value: int, fraction: float) -> None:
    fraction = fraction if abs(value) < 2**40 else 0.0
    got = low_bits(torch.tensor([value + fraction], dtype=torch.float64)).item()
    assert got == (value + 2**31) % 2**32 - 2**31


def test_keystream_is_aes_256_in_counter_mode() -> None:
    # NIST SP 800-38A, F.5.5.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228")
    stream = Keystream(key, int.from_bytes(counter[8:], "big"), counter[:8])
    block = stream.fill(np.empty(room(16), dtype=np.uint8), 16)
    assert bytes(b ^ p for b, p in zip(block, plain, strict=True)) == cipher


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 7), st.integers(1, 20), st.integers(1, 600_000 // 16))
def test_keystream_rows_do_not_depend_on_how_they_are_cut(rows: int, first: int, count: int, blocks: int) -> None:
    row_bytes = 16 * (blocks % 64 + 1)
    count = min(count, rows)
    first = min(first, rows - count)
    key = bytes(range(32))
    whole = expand(key, 0, rows, row_bytes, np.empty(room(rows * row_bytes), dtype=np.uint8)).copy()
    part = expand(key, first, count, row_bytes, np.empty(room(count * row_bytes), dtype=np.uint8))
    assert np.array_equal(part, whole[first * row_bytes : (first + count) * row_bytes])


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Deviation of a chi-square statistic from its mean, in standard deviations."""
    degrees = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


def test_secrets_are_uniform_ternary_and_differ_between_keys() -> None:
    values = ternary(bytes(range(32)), 256_000)
    counts = np.array([(values == v).sum() for v in (-1, 0, 1)], dtype=float)
    assert counts.sum() == len(values)
    assert abs(chi_square(counts, np.full(3, len(values) / 3))) < 5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(len(values))
    assert (values[:1280] != ternary(bytes(32), 1280)).mean() > 0.6
    assert (values[:1280] == ternary(bytes(range(32)), 1280)).all()


def test_errors_have_the_declared_distribution() -> None:
    from math import comb

    tokens, rows = 1001, 300
    nbytes = WIDE.error_row_bytes(tokens)
    noise = expand(bytes(32), 0, rows, nbytes, np.empty(room(rows * nbytes), dtype=np.uint8))
    errors = centred_binomial(torch.from_numpy(noise).view(rows, nbytes), tokens).numpy().reshape(-1)
    assert abs(errors.mean()) < 5 * np.sqrt(10.5 / len(errors))
    assert abs(errors.var() / 10.5 - 1) < 5 * np.sqrt(2 / len(errors))
    support = np.arange(-9, 10)
    expected = np.array([comb(42, 21 + v) for v in support], dtype=float) / 2**42 * len(errors)
    observed = np.array([(errors == v).sum() for v in support], dtype=float)
    outside = len(errors) - expected.sum()
    observed, expected = np.append(observed, (abs(errors) > 9).sum()), np.append(expected, outside)
    assert abs(chi_square(observed, expected)) < 5


@given(st.lists(INT32, min_size=1, max_size=20))
def test_errors_count_ones(words: list[int]) -> None:
    tokens = len(words)
    halves = np.arange(tokens, dtype=np.uint16) * 7919
    row = np.concatenate([np.array(words, dtype=np.int32).view(np.uint8), halves.view(np.uint8)])
    noise = torch.zeros(1, WIDE.error_row_bytes(tokens), dtype=torch.uint8)
    noise[0, : len(row)] = torch.from_numpy(row)
    want = [
        (w & 0xFFFFFFFF).bit_count() + (int(h) & 0x3FF).bit_count() - 21 for w, h in zip(words, halves, strict=True)
    ]
    assert centred_binomial(noise, tokens)[0].tolist() == want


def chosen_beside(other: Kernel, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel is chosen where the other is the fastest."""
    monkeypatch.setattr(kernels, "KERNELS", {"other": other, "float64": KERNELS["float64"]})
    monkeypatch.setattr(kernels, "speed", lambda kernel, device: 2.0 if kernel is other else 1.0)
    name: str = choose_kernel.__wrapped__(CPU)[0]
    return name


def test_a_faster_kernel_that_is_exact_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_beside(Float64Kernel(), monkeypatch) == "other"


def test_a_kernel_that_is_missing_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Float64Kernel):
        def operand(self, planes: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    assert kernels.speed(Missing(), CPU) == 0
    monkeypatch.setattr(kernels, "KERNELS", {"missing": Missing(), "float64": KERNELS["float64"]})
    assert choose_kernel.__wrapped__(CPU)[0] == "float64"


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
    assert chosen_beside(Saturating(), monkeypatch) == "float64"


@pytest.mark.parametrize("wrong", [(1, 5), (5, 1), "transposed", "apart"])
def test_a_kernel_that_errs_on_a_layout_in_use_is_never_chosen(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Errs(Float64Kernel):
        def multiply(
            self, weight: torch.Tensor, operand: torch.Tensor, out: torch.Tensor, *, add: bool = False
        ) -> None:
            super().multiply(weight, operand, out, add=add)
            (rows, depth), (along, across) = weight.shape, weight.stride()
            layout = "transposed" if along == 1 < min(across, rows, depth) else ""
            layout = "apart" if along > depth > 1 == across else layout
            if wrong == layout or wrong == (min(rows, 5), min(depth, 5)):
                out.add_(1)

    assert chosen_beside(Errs(), monkeypatch) == "float64"


def test_a_kernel_that_does_not_add_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwrites(Float64Kernel):
        def multiply(
            self, weight: torch.Tensor, operand: torch.Tensor, out: torch.Tensor, *, add: bool = False
        ) -> None:
            super().multiply(weight, operand, out)

    assert chosen_beside(Overwrites(), monkeypatch) == "float64"


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
    """Compare a product, and the same added to it, with exact ones mod 2^8P."""
    out = torch.full((len(w), b.shape[2]), 7, dtype=torch.int32)
    kernel.multiply(w, kernel.operand(b), out)
    first = out.long().clone()
    kernel.multiply(w, kernel.operand(b), out, add=True)
    want = w.long() @ values_of(b)
    modulus = 2 ** (8 * b.shape[1])
    assert torch.equal((first - want) % modulus, torch.zeros_like(want))
    assert torch.equal((out.long() - 2 * want) % modulus, torch.zeros_like(want))


@pytest.fixture
def int16() -> None:
    if kernels.speed(KERNELS["int16"], CPU) == 0:
        pytest.skip("this processor has no AVX2, or the native library was not built")


@pytest.mark.usefixtures("int16")
@settings(max_examples=60)
@given(st.data())
def test_products_of_limbs_are_exact_for_any_sizes_and_strides(data: st.DataObject) -> None:
    sizes = st.integers(1, 9) | st.sampled_from([15, 16, 17, 63, 64, 65, 130])
    rows, columns = data.draw(sizes), data.draw(sizes)
    depth = data.draw(sizes | st.sampled_from([1023, 1024, 1025, 2051]))
    count = data.draw(st.sampled_from([3, 4]))
    w = torch.randint(-128, 128, (rows, depth + 3), dtype=torch.int8)[:, 2 : 2 + depth]
    if data.draw(st.booleans()):
        w = w.t().contiguous().t()
    b = torch.randint(0, 256, (depth, count, columns + 2), dtype=torch.uint8)[:, :, 1 : columns + 1]
    w[0], b[:, :, 0] = -128, 255
    hold_exact(KERNELS["int16"], w, b)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", ["int8", "float64"])
@settings(max_examples=40)
@given(st.data())
def test_products_are_exact_for_any_sizes_and_strides(name: str, portable: bool, data: st.DataObject) -> None:
    rows, depth, columns = (data.draw(st.integers(1, 12)) for _ in range(3))
    count = data.draw(st.sampled_from([3, 4]))
    w = data.draw(matrices(rows, depth))
    b = torch.randint(0, 256, (depth, count, columns + 2), dtype=torch.uint8)[:, :, 1 : columns + 1]
    kernel = KERNELS[name]
    with pytest.MonkeyPatch.context() as patch:
        # Older releases of torch have no int8 product for the CPU: there the stand-in is always used.
        if kernels.speed(KERNELS["int8"], CPU) == 0 or data.draw(st.booleans()):
            patch.setattr(torch, "_int_mm", confused)
        if portable:
            patch.setattr(native, "library", lambda: None)
        patch.setattr(type(kernel), "DEPTH", data.draw(st.sampled_from([5, 1 << 13])))
        hold_exact(kernel, w, b)


@pytest.mark.parametrize("name", ["int8", "int16", "float64"])
def test_sums_of_extreme_values_stay_exact(name: str) -> None:
    if name == "int16" and kernels.speed(KERNELS[name], CPU) == 0:
        pytest.skip("this processor has no AVX2, or the native library was not built")
    depth = (1 << 15) + 3
    w = torch.full((2, depth), -128, dtype=torch.int8)
    w[1] = 127
    b = torch.full((depth, 4, 2), 255, dtype=torch.uint8)
    b[:, :, 1] = torch.tensor([0, 0, 0, 128], dtype=torch.uint8)
    out = torch.empty(2, 2, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        if kernels.speed(KERNELS["int8"], CPU) == 0:
            patch.setattr(torch, "_int_mm", confused)
        KERNELS[name].multiply(w, KERNELS[name].operand(b), out)
    want = w.long() @ values_of(b)
    assert torch.equal((out.long() - want) % 2**32, torch.zeros_like(want))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize("name", ["int8", "float64"])
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
        patch.setattr(half, "_kernel", KERNELS[name])
        patch.setattr(torch, "_int_mm", confused)
        patch.setattr(worker, "BLOCK_VALUES", 1)
        reply = half.evaluate(half.prepare(weight), direction, {"b": b})
    got = values_of(reply["y"])
    if weight_bits == 16:
        got = got[: len(matrix)] + 256 * got[len(matrix) :]
    want = matrix.long() @ values_of(b)
    assert reply["y"].shape == (weight_bits // 8 * len(matrix), count, tokens)
    assert torch.equal((got - want) % 2 ** (8 * count), torch.zeros_like(want))


def test_a_worker_takes_no_fields_and_no_key() -> None:
    with pytest.raises(ProtocolError, match="without fields"):
        worker.MLWEWorker({"parameters": "mlwe-1280"}, CPU)
    with pytest.raises(ProtocolError, match="no evaluation key"):
        MLWEBackend.worker({}, {"key": torch.zeros(1)}, CPU)


@pytest.mark.slow
def test_the_worker_half_loads_nothing_of_the_client_half() -> None:
    probe = "import sys, {0}; print([m for m in sys.modules if m in {1!r}])"
    secret = [f"ciphertune_mlwe.{name}" for name in ("client", "masks", "mask_memory", "hints", "public", "transforms")]
    pairs = {"ciphertune_mlwe.worker": secret, "ciphertune_mlwe.client": ["ciphertune_mlwe.worker"]}
    for module, others in pairs.items():
        run = subprocess.run(
            [sys.executable, "-c", probe.format(module, others)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ},
        )
        assert run.stdout.strip() == "[]", module
