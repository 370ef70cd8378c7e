"""The exact arithmetic under the mlwe backend: ring, bytes, products, samplers, and what the worker does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ciphertune.errors import ProtocolError
from ciphertune_mlwe import MLWEBackend, native, planes, worker
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


def test_a_worker_takes_no_fields_and_no_key() -> None:
    with pytest.raises(ProtocolError, match="without fields"):
        worker.MLWEWorker({"parameters": "mlwe-1280"}, CPU)
    with pytest.raises(ProtocolError, match="no evaluation key"):
        MLWEBackend.worker({}, {"key": torch.zeros(1)}, CPU)
