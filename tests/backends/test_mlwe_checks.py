"""Check vectors: each lie of a worker is seen at the rate that was computed, and honest answers always pass."""

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from mlwe_halves import CPU, Halves, random_codes
from torch import Tensor

from ciphertune.backend import DIRECTIONS, Direction
from ciphertune.errors import SecurityError, WrongReplyError
from ciphertune_mlwe import checks, native
from ciphertune_mlwe.checks import CheckVectors, Vectors, cuts_of, right, weighted_sums
from ciphertune_mlwe.planes import lifted, split_bytes

pytestmark = pytest.mark.usefixtures("two_threads")
OUTPUTS, FEATURES, TOKENS = 40, 48, 20
Lie = Callable[[Tensor, torch.Generator], Tensor]


def values_of(planes: Tensor) -> Tensor:
    """Values mod 2^8P, int64."""
    found: Tensor = sum(planes[:, p].long() << (8 * p) for p in range(planes.shape[1]))  # type: ignore[assignment]
    return found


def planes_of(values: Tensor, count: int) -> Tensor:
    out = torch.empty(values.shape[0], count, values.shape[1], dtype=torch.uint8)
    split_bytes((values & 0xFFFFFFFF).to(torch.int32).contiguous(), out)
    return out


def two_rows(y: Tensor, generator: torch.Generator) -> list[int]:
    return torch.randperm(len(y), generator=generator)[:2].tolist()


def zero_a_row(y: Tensor, generator: torch.Generator) -> Tensor:
    y[3] = 0
    return y


def scale_a_row(y: Tensor, generator: torch.Generator) -> Tensor:
    y[3] = (y[3].double() * 1.01).long()
    return y


def half_of_two_rows(y: Tensor, generator: torch.Generator) -> Tensor:
    y[2:4] += 1 << 23
    return y


def half_of_all_rows(y: Tensor, generator: torch.Generator) -> Tensor:
    return y + (1 << 23)


def opposites(y: Tensor, generator: torch.Generator) -> Tensor:
    y[5] += 77
    y[9] -= 77
    return y


def opposites_drawn_anew(y: Tensor, generator: torch.Generator) -> Tensor:
    one, other = two_rows(y, generator)
    y[one] += 77
    y[other] -= 77
    return y


def one_unit(y: Tensor, generator: torch.Generator) -> Tensor:
    y[7, 11] += 1
    return y


def swap_tokens(y: Tensor, generator: torch.Generator) -> Tensor:
    return y[:, [1, 0, *range(2, y.shape[1])]]


def drop_low_bits(y: Tensor, generator: torch.Generator) -> Tensor:
    return y & ~0xFFF


LIES: dict[str, Lie] = {
    each.__name__: each
    for each in (
        zero_a_row,
        scale_a_row,
        half_of_two_rows,
        half_of_all_rows,
        opposites,
        opposites_drawn_anew,
        one_unit,
        swap_tokens,
        drop_low_bits,
    )
}


def asked(codes: Tensor, planes: int, direction: Direction, seed: int) -> tuple[Tensor, Tensor]:
    """A request, and the honest answer."""
    matrix = codes.long() if direction == "forward" else codes.long().t()
    generator = torch.Generator().manual_seed(seed)
    b = torch.randint(0, 256, (matrix.shape[1], planes, TOKENS), dtype=torch.uint8, generator=generator)
    return b, matrix @ values_of(b)


def pool(codes: Tensor, seed: int = 0, cuts: tuple[int, ...] | None = None) -> CheckVectors:
    digits = codes.element_size()
    made = CheckVectors(bytes([seed] * 32), codes.shape[0], codes.shape[1], digits, cuts or (0, len(codes)), CPU)
    for row in range(0, len(codes), 16):
        made.absorb(row, codes[row : row + 16])
    return made


def seen_by(vectors: Vectors, request: Tensor, reply: Tensor) -> int:
    """How many of the 64 vectors see that a reply is wrong."""
    left, wanted = weighted_sums([(vectors.left.to(torch.int32), reply), (vectors.right[0], request)])
    return int((left != wanted).any(dim=1).sum())


@pytest.mark.parametrize("planes", [3, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lie", LIES)
def test_at_least_half_of_the_vectors_see_each_lie(lie: str, direction: Direction, planes: int) -> None:
    """Computed: each with probability 1/2 or more. Measured over 20 pools; five standard deviations are 0.07."""
    codes, total = random_codes(OUTPUTS, FEATURES), 0
    for number in range(20):
        one = pool(codes, number)
        vectors = one.forward(()) if direction == "forward" else one.backward(())
        b, y = asked(codes, planes, direction, number)
        assert seen_by(vectors, b, planes_of(y, planes)) == 0, "an honest answer passes all of them"
        told = LIES[lie](y.clone(), torch.Generator().manual_seed(number))
        total += seen_by(vectors, b, planes_of(told, planes))
    assert total / (20 * checks.VECTORS) >= 0.43


def test_plus_and_minus_one_alone_would_not_see_half_the_modulus() -> None:
    """Why entries may be zero: with odd entries alone no vector sees half the modulus added to two rows."""
    codes = random_codes(OUTPUTS, FEATURES)
    b, y = asked(codes, 3, "forward", 0)
    r = torch.randint(0, 2, (checks.VECTORS, OUTPUTS)) * 2 - 1
    odd = Vectors(r.to(torch.int8), (r @ codes.long()).to(torch.int32)[None])
    assert seen_by(odd, b, planes_of(y, 3)) == 0
    assert seen_by(odd, b, planes_of(half_of_two_rows(y.clone(), torch.Generator()), 3)) == 0
    assert seen_by(odd, b, planes_of(zero_a_row(y.clone(), torch.Generator()), 3)) == checks.VECTORS


def test_entries_are_minus_one_zero_zero_and_one() -> None:
    left = pool(random_codes(OUTPUTS, FEATURES)).forward(()).left
    share = [float((left == value).double().mean()) for value in (-1, 0, 1)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    other = pool(random_codes(OUTPUTS, FEATURES), 1)
    assert not torch.equal(left, other.forward(()).left)
    assert not torch.equal(other.forward(()).left[:, :8], other.backward(()).left[:, :8])


def test_eight_are_drawn_once_the_reply_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lie that no vector of a fixed eight sees is seen by the next eight."""
    codes = random_codes(OUTPUTS, FEATURES)
    one = pool(codes).forward(())
    b, y = asked(codes, 3, "forward", 0)
    told = planes_of(one_unit(y, torch.Generator()), 3)
    blind = [j for j in range(checks.VECTORS) if int(one.left[j, 7]) == 0]
    drawn: list[list[int]] = []

    class Drawing:
        def sample(self, population: range, count: int) -> list[int]:
            assert (len(population), count) == (64, 8)
            return drawn.pop()

    drawn += [[*blind[:7], next(j for j in range(64) if j not in blind)], blind[:8]]
    monkeypatch.setattr(checks, "_draw", Drawing())
    assert right(one, b, told), "eight that do not look at this row"
    assert not right(one, b, told)


def test_few_tokens_are_held_against_all_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_draw", None)
    codes = random_codes(OUTPUTS, FEATURES)
    one = pool(codes).forward(())
    b, y = asked(codes, 3, "forward", 0)
    assert right(one, b[:, :, :16].contiguous(), planes_of(y[:, :16], 3))
    y[7, 11] += 1
    assert not right(one, b[:, :, :16].contiguous(), planes_of(y[:, :16], 3))


@given(
    rows=st.integers(1, 90),
    features=st.integers(1, 90),
    digits=st.integers(1, 2),
    tokens=st.integers(1, checks.FEW_TOKENS),
    planes=st.sampled_from([3, 4]),
    part=st.booleans(),
    seed=st.integers(0, 99),
)
def test_few_tokens_are_checked_alike_in_one_call_and_in_tensors(
    rows: int, features: int, digits: int, tokens: int, planes: int, part: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (digits, rows, features), dtype=torch.int8, generator=generator)
    left = torch.randint(-1, 2, (checks.VECTORS, rows), dtype=torch.int8, generator=generator)
    vectors = Vectors(left, (left.long() @ codes.long()).to(torch.int32))
    b = torch.randint(0, 256, (2 * features, planes, tokens), dtype=torch.uint8, generator=generator)
    b = b[features:] if part else b[:features]
    y = planes_of((codes.long() @ values_of(b)).flatten(0, 1), planes)
    wrong = y.clone()
    wrong[rows // 2, planes // 2, tokens // 2] ^= 4
    seen = bool(left[:, rows // 2].any())
    for each in (nullcontext(), pytest.MonkeyPatch.context()):
        with each as patch:
            if patch is not None:
                patch.setattr(native, "library_for", lambda _: None)
            assert right(vectors, b, y)
            assert right(vectors, b, wrong) is not seen


def test_vectors_of_another_product_are_no_reason_to_read_beyond_memory() -> None:
    one = pool(random_codes(OUTPUTS, FEATURES)).forward(())
    b, y = asked(random_codes(OUTPUTS, FEATURES), 3, "forward", 0)
    with pytest.raises((ValueError, RuntimeError)):
        right(one, b[: FEATURES // 2, :, :2].contiguous(), planes_of(y[:, :2], 3))
    with pytest.raises((ValueError, RuntimeError)):
        right(one, b[:, :, :2].contiguous(), planes_of(y[: OUTPUTS // 2, :2], 3))


@pytest.mark.usefixtures("code")
@given(
    rows=st.integers(1, 90),
    count=st.sampled_from([1, 8, 64]),
    tokens=st.integers(1, 200),
    planes=st.sampled_from([3, 4]),
    dtype=st.sampled_from([torch.int8, torch.int32]),
    seed=st.integers(0, 99),
)
def test_weighted_sums_are_exact(
    rows: int, count: int, tokens: int, planes: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.iinfo(dtype)
    weights = torch.randint(ends.min, ends.max + 1, (count, rows), dtype=dtype, generator=generator)
    values = torch.randint(0, 256, (rows, planes, tokens), dtype=torch.uint8, generator=generator)
    strided = torch.randint(0, 256, (rows, planes, 2 * tokens), dtype=torch.uint8, generator=generator)[:, :, ::2]
    for sums, of in zip(weighted_sums([(weights, values), (weights, strided)]), (values, strided), strict=True):
        wanted = (weights.long() @ lifted(of).long()) & 0xFFFFFFFF
        assert torch.equal(sums.long() & 0xFFFFFFFF, wanted)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize("outputs", [1, 63, 150])
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_honest_answers_always_pass(weight_bits: int, outputs: int, tokens: int) -> None:
    for direction, pad in itertools.product(DIRECTIONS, ("1", "32")):
        halves = Halves(random_codes(outputs, 70, weight_bits), pad_tokens=pad)
        for _ in range(3):
            halves.product(torch.randn(tokens, halves.maps[direction].in_features), direction)


@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tokens", [1, 30])
def test_nothing_of_a_wrong_answer_is_decrypted(
    weight_bits: int, direction: Direction, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digit by digit: a wrong value of either is seen, and what is decrypted stays what was checked."""
    halves = Halves(random_codes(OUTPUTS, FEATURES, weight_bits))
    linear_map = halves.maps[direction]
    monkeypatch.setattr(type(halves.client), "put_together", None)
    for row in (0, weight_bits // 8 * linear_map.out_features - 1):
        caught = 0
        for _ in range(20):
            sent = halves.client.encrypt(torch.randn(tokens, linear_map.in_features), linear_map)
            reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), direction, sent.buffers)
            reply["y"][row] += 1
            try:
                with pytest.raises(WrongReplyError, match="not the product"):
                    halves.client.decrypt(reply, sent.state, linear_map)
                caught += 1
            except TypeError:  # 'NoneType' object is not callable: it got as far as decryption
                assert tokens > checks.FEW_TOKENS
        # 1/256 each passes; three of twenty do once in ten thousand.
        assert caught >= 18


def test_replies_to_other_requests_and_of_other_weights() -> None:
    halves = Halves(random_codes(OUTPUTS, FEATURES))
    others = Halves(random_codes(OUTPUTS, FEATURES, seed=1))
    linear_map = halves.maps["forward"]
    before, now = (halves.client.encrypt(torch.randn(8, FEATURES), linear_map) for _ in range(2))
    prepared = halves.worker.prepare(halves.codes)
    for reply in (
        halves.worker.evaluate(prepared, "forward", before.buffers),
        others.worker.evaluate(others.worker.prepare(others.codes), "forward", now.buffers),
    ):
        with pytest.raises(WrongReplyError):
            halves.client.decrypt(reply, now.state, linear_map)
    halves.client.decrypt(halves.worker.evaluate(prepared, "forward", now.buffers), now.state, linear_map)


def test_pieces_are_held_against_sums_of_their_parts() -> None:
    codes = random_codes(150, FEATURES, 16)
    cut = pool(codes, 3, (0, 10, 64, 80, 150))
    whole = pool(codes, 3)
    assert torch.equal(cut.forward(()).right, whole.forward(()).right)
    rows = ((80, 150), (10, 64))
    piece = cut.forward(rows)
    assert torch.equal(
        piece.left, torch.cat([whole.forward(()).left[:, 80:150], whole.forward(()).left[:, 10:64]], dim=1)
    )
    chosen = torch.cat([codes[80:150], codes[10:64]]).long()
    low = (chosen + 128) % 256 - 128
    for digit, values in enumerate((low, (chosen - low) // 256)):
        assert torch.equal(piece.right[digit].long(), piece.left.long() @ values)
        r = cut.backward(rows).left.long()
        assert torch.equal(cut.backward(rows).right[digit].long(), r @ values.t())
    assert cut.covers([rows, ((0, 150),), ()])
    assert not cut.covers([((0, 11),)])
    assert cuts_of(150, [rows, (), ((3, 10),)]) == [0, 3, 10, 64, 80, 150]


def test_a_piece_that_could_not_be_checked_is_not_sent() -> None:
    halves = Halves(random_codes(150, FEATURES))
    whole = halves.maps["forward"]
    part = dataclasses.replace(whole, identity="", rows=((64, 150),), out_features=86)
    with pytest.raises(SecurityError, match="could not be checked"):
        halves.client.encrypt_pieces(torch.randn(3, FEATURES), whole, [part])
    halves.prepare([part])
    halves.client.encrypt_pieces(torch.randn(3, FEATURES), whole, [part])
    assert halves.client.preparation(halves.maps["forward"], halves.maps["backward"], [part]) is None
    assert halves.client.preparation(halves.maps["forward"], halves.maps["backward"]) is None, "and the whole still is"


def test_checks_can_be_switched_off() -> None:
    halves = Halves(random_codes(OUTPUTS, FEATURES), check="0")
    sent = halves.client.encrypt(torch.randn(30, FEATURES), halves.maps["forward"])
    reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), "forward", sent.buffers)
    reply["y"][3] += 1
    halves.client.decrypt(reply, sent.state, halves.maps["forward"])
    assert not halves.client._checks


def test_vectors_are_not_shown() -> None:
    one: Any = pool(random_codes(OUTPUTS, FEATURES))
    assert repr(one.forward(())) == "Vectors()"
    assert "tensor" not in repr(one)
