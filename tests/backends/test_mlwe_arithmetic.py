"""The exact arithmetic under the mlwe backend: ring, digits, products, samplers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ciphertune.errors import ProtocolError
from ciphertune_mlwe import kernels, native, worker
from ciphertune_mlwe.kernels import KERNELS, choose_kernel
from ciphertune_mlwe.planes import compose, low_bits, split
from ciphertune_mlwe.prg import Keystream, centred_binomial, error_row_bytes, expand, expand_exactly, room, ternary
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


@given(st.lists(INT32, min_size=1, max_size=40), st.integers(0, 2))
def test_digits_round_to_nearest_and_compose_back(values: list[int], dropped: int) -> None:
    planes = 4 - dropped
    out = torch.empty(1, planes, len(values), dtype=torch.int8)
    split(torch.tensor([values], dtype=torch.int32), out, dropped)
    back = compose(out, torch.empty(1, len(values), dtype=torch.float64)).to(torch.int64)[0].tolist()
    unit = 256**dropped
    left_out = sum(256**i for i in range(dropped))
    for value, digits in zip(values, back, strict=True):
        difference = (value - digits * unit + 2**31) % 2**32 - 2**31
        # What is left out is a number of balanced digits.
        assert -128 * left_out <= difference <= 127 * left_out


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
    part = np.empty(count * row_bytes, dtype=np.uint8)
    expand_exactly(key, first, count, row_bytes, part)
    assert np.array_equal(part, whole[first * row_bytes : (first + count) * row_bytes])


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Deviation of a chi-square statistic from its mean, in standard deviations."""
    degrees = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


def test_secrets_are_uniform_ternary_and_differ_between_blocks_and_keys() -> None:
    key = bytes(range(32))
    values = np.concatenate([ternary(key, block, 1280) for block in range(200)])
    counts = np.array([(values == v).sum() for v in (-1, 0, 1)], dtype=float)
    assert counts.sum() == len(values)
    assert abs(chi_square(counts, np.full(3, len(values) / 3))) < 5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(len(values))
    assert (ternary(key, 0, 1280) != ternary(key, 1, 1280)).mean() > 0.6
    assert (ternary(key, 0, 1280) != ternary(bytes(32), 0, 1280)).mean() > 0.6


def test_errors_have_the_declared_distribution() -> None:
    from math import comb

    tokens, rows = 1001, 300
    nbytes = error_row_bytes(tokens)
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
    noise = torch.zeros(1, error_row_bytes(tokens), dtype=torch.uint8)
    noise[0, : len(row)] = torch.from_numpy(row)
    want = [
        (w & 0xFFFFFFFF).bit_count() + (int(h) & 0x3FF).bit_count() - 21 for w, h in zip(words, halves, strict=True)
    ]
    assert centred_binomial(noise, tokens)[0].tolist() == want


def test_the_chosen_kernel_is_exact_and_a_saturating_one_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    name, speeds = choose_kernel(CPU)
    assert name in KERNELS
    assert speeds[name] == max(speeds.values()) > 0

    def saturating(w: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        # What processors without a dot-product instruction do: pairs of products saturate at 16 bits.
        w, x = w.long(), x.long()
        if w.shape[1] % 2:
            w, x = torch.nn.functional.pad(w, (0, 1)), torch.nn.functional.pad(x, (0, 0, 0, 1))
        pairs = w[:, 0::2, None] * x[None, 0::2] + w[:, 1::2, None] * x[None, 1::2]
        out.copy_(pairs.clamp(-32768, 32767).sum(1))

    monkeypatch.setattr(kernels, "KERNELS", {"saturating": saturating, "float64": KERNELS["float64"]})
    assert choose_kernel.__wrapped__(CPU)[0] == "float64"
    assert "saturating" not in choose_kernel.__wrapped__(CPU)[1]


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


@pytest.mark.parametrize("kernel", ["int8", "float64"])
@settings(max_examples=40)
@given(st.data())
def test_products_are_exact_for_any_sizes_and_strides(kernel: str, data: st.DataObject) -> None:
    rows, depth, columns = (data.draw(st.integers(1, 12)) for _ in range(3))
    w, x = data.draw(matrices(rows, depth)), data.draw(matrices(depth, columns))
    with pytest.MonkeyPatch.context() as patch:
        # Older releases of torch have no int8 product for the CPU: there the stand-in is always used.
        if "int8" not in choose_kernel(CPU)[1] or data.draw(st.booleans()):
            patch.setattr(torch, "_int_mm", confused)
        out = torch.empty(rows, columns, dtype=torch.int32)
        KERNELS[kernel](w, x, out)
    assert torch.equal(out.long(), w.long() @ x.long())


@pytest.mark.parametrize("wrong", [(1, 5), (5, 1), "transposed", "apart"])
def test_a_kernel_that_errs_on_a_layout_in_use_is_never_chosen(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def errs(w: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(w.long() @ x.long())
        (rows, depth), (along, across) = w.shape, w.stride()
        layout = "transposed" if along == 1 and across > rows > 1 else "apart" if along > depth > 1 == across else ""
        if wrong == layout or wrong == (min(rows, 5), min(depth, 5)):
            out.add_(1)

    monkeypatch.setattr(kernels, "KERNELS", {"errs": errs, "float64": KERNELS["float64"]})
    assert choose_kernel.__wrapped__(CPU)[0] == "float64"
    assert "errs" not in choose_kernel.__wrapped__(CPU)[1]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("weight_bits", [8, 16])
@settings(max_examples=40)
@given(st.data())
def test_evaluation_is_exact_for_any_sizes(weight_bits: int, direction: str, data: st.DataObject) -> None:
    rows, features, tokens = (data.draw(st.sampled_from([1, 2, 3, 17])) for _ in range(3))
    dtype, top = (torch.int8, 127) if weight_bits == 8 else (torch.int16, 32639)
    weight = torch.randint(-top, top + 1, (rows, features), dtype=dtype)
    half = worker.MLWEWorker({"parameters": "mlwe-1280", "request_bits": 32, "reply_bits": 32}, CPU)
    matrix = weight if direction == "forward" else weight.t()
    b = torch.randint(-128, 128, (matrix.shape[1], 4, tokens), dtype=torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "_kernel", KERNELS["int8"])
        patch.setattr(torch, "_int_mm", confused)
        request = {"seed": torch.zeros(32, dtype=torch.uint8), "b": b}
        reply = half.evaluate(half.prepare(weight), direction, request)  # type: ignore[arg-type]
    powers = 256 ** torch.arange(4)
    got = (reply["b"].long() * powers[:, None]).sum(1)
    if weight_bits == 16:
        got = got[: len(matrix)] + 256 * got[len(matrix) :]
    want = matrix.long() @ (b.long() * powers[:, None]).sum(1)
    assert torch.equal((got - want) % 2**32, torch.zeros_like(want))


def reference_product(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, reply_planes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``W a`` and ``W b`` mod 2^32 in int64, rounded to the top digits."""

    def one(planes: torch.Tensor, kept: int) -> torch.Tensor:
        count = planes.shape[1]
        shifts = torch.tensor([256 ** (4 - count + i) for i in range(count)])
        values = (planes.long() * shifts[:, None]).sum(1)
        total = weight.long() @ values  # wraps mod 2^64, which 2^32 divides
        unit = 256 ** (4 - kept)
        carry = sum(128 * 256**i for i in range(4 - kept))
        return torch.div(total + carry, unit, rounding_mode="floor") % 256**kept

    return one(a, reply_planes[0]), one(b, reply_planes[1])


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("request_bits", [24, 32])
@pytest.mark.parametrize(
    ("reply_bits", "body_bits"), [(16, None), (24, None), (32, None), (24, 16), (32, 16), (32, 24)]
)
@pytest.mark.parametrize("weight_bits", [8, 16])
def test_evaluation_is_bit_exact(
    portable: bool,
    direction: str,
    request_bits: int,
    reply_bits: int,
    body_bits: int | None,
    weight_bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if portable:
        monkeypatch.setattr(worker, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the native library was not built")
    # Small blocks, so that several are needed in both dimensions.
    monkeypatch.setattr(worker, "MAX_DEPTH", 32)
    monkeypatch.setattr(worker, "BLOCK_VALUES", 1 << 16)
    torch.manual_seed(reply_bits + request_bits)
    rows, features, tokens = 37, 75, 131
    dtype, top = (torch.int8, 127) if weight_bits == 8 else (torch.int16, 32639)
    weight = torch.randint(-top, top + 1, (rows, features), dtype=dtype)
    weight[0], weight[:, 0] = top, -top
    fields = {"parameters": "mlwe-1280", "request_bits": request_bits, "reply_bits": reply_bits}
    half = worker.MLWEWorker(fields if body_bits is None else {**fields, "body_bits": body_bits}, CPU)
    matrix = weight if direction == "forward" else weight.t()
    seed = torch.arange(32, dtype=torch.uint8)
    b = torch.randint(-128, 128, (matrix.shape[1], request_bits // 8, tokens), dtype=torch.int8)
    reply = half.evaluate(half.prepare(weight), direction, {"seed": seed, "b": b})  # type: ignore[arg-type]
    nbytes = 4 * 1280
    stream = expand(bytes(range(32)), 0, matrix.shape[1], nbytes, np.empty(room(matrix.shape[1] * nbytes), np.uint8))
    a = torch.from_numpy(stream.copy()).view(torch.int8).view(matrix.shape[1], 4, 1280)
    planes = reply_bits // 8, (body_bits or reply_bits) // 8
    digits = [matrix]
    if weight_bits == 16:
        low = (matrix.long() + 128) % 256 - 128
        digits = [low, (matrix.long() - low) // 256]
    parts = [reference_product(digit, a, b, planes) for digit in digits]
    for name, kept, want in zip(("a", "b"), planes, map(torch.cat, zip(*parts, strict=True)), strict=True):
        got = (reply[name].long() * torch.tensor([256**i for i in range(kept)])[:, None]).sum(1) % 256**kept
        assert torch.equal(got, want), name


@pytest.mark.parametrize("body_bits", [8, 20, 32, "16", None, True, [16]])
def test_a_worker_refuses_body_bits_that_no_client_sends(body_bits: object) -> None:
    fields = {"parameters": "mlwe-1280", "request_bits": 32, "reply_bits": 24, "body_bits": body_bits}
    with pytest.raises(ProtocolError, match="body_bits"):
        worker.MLWEWorker(fields, CPU)


@pytest.mark.slow
def test_the_two_halves_do_not_load_each_other() -> None:
    probe = "import sys, {0}; print([m for m in sys.modules if m in {1!r}])"
    pairs = {
        "ciphertune_mlwe.worker": ["ciphertune_mlwe.client", "ciphertune_mlwe.keys", "ciphertune_mlwe.engine"],
        "ciphertune_mlwe.client": ["ciphertune_mlwe.worker", "ciphertune_mlwe.kernels"],
    }
    for module, others in pairs.items():
        run = subprocess.run(
            [sys.executable, "-c", probe.format(module, others)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ},
        )
        assert run.stdout.strip() == "[]", module
