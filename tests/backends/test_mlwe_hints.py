"""The public matrix of the mlwe backend, and the hints that a client makes of it and of the codes."""

import hashlib
from typing import Any

import pytest
import torch
from mlwe_halves import CPU, Halves, error_of, random_codes

from ciphertune.backend import DIRECTIONS, Direction, LinearMap
from ciphertune.errors import SecurityError
from ciphertune_mlwe import native, public
from ciphertune_mlwe.client import MLWEClient
from ciphertune_mlwe.params import NARROW, WIDE, ParameterSet
from ciphertune_mlwe.planes import join_bytes
from ciphertune_mlwe.public import PublicMatrix
from ciphertune_mlwe.transforms import NativeTransforms, TensorTransforms, make_transforms

pytestmark = pytest.mark.usefixtures("two_threads")
SEED = bytes(range(32))


def matrix(seed: bytes = SEED, model: bytes = b"") -> PublicMatrix:
    return PublicMatrix(seed, model, make_transforms(CPU))


def client(weight_bits: int = 8, sets: dict[Direction, ParameterSet] | None = None) -> MLWEClient:
    """A client of a known public matrix, with parameters by direction."""
    chosen = sets or dict.fromkeys(DIRECTIONS, NARROW)

    def parameters(linear_map: LinearMap) -> ParameterSet:
        return chosen[linear_map.direction]

    return MLWEClient(parameters, weight_bits // 8, 1, True, 1 << 24, False, CPU, seed=SEED)


def test_rows_are_a_stream_of_shake() -> None:
    domain = b"ciphertune mlwe public matrix, degree 256, q = 2^32"
    found = matrix(SEED, b"model").rows(7, 8, 5).numpy().astype("<i4").tobytes()
    assert found == hashlib.shake_128(domain + SEED + b"model" + (7).to_bytes(8, "little")).digest(5120)


def test_rows_are_prefixes_of_longer_ones_and_do_not_depend_on_how_they_are_asked_for() -> None:
    one = matrix()
    rows = one.rows(0, 9, 6)
    assert torch.equal(one.rows(0, 9, 5), rows[:, :1280]), "five elements are a prefix of six"
    assert torch.equal(one.rows(4, 9, 6), rows[4:])
    assert torch.equal(matrix().rows(0, 9, 6), rows)
    assert torch.unique(one.rows(0, 300, 5)[:, :2], dim=0).shape[0] == 300


def test_matrices_of_other_seeds_and_models_are_others() -> None:
    found = [made.rows(0, 3, 5) for made in (matrix(), matrix(bytes(32)), matrix(model=b"model"))]
    for other in found[1:]:
        assert (other != found[0]).all()
    assert torch.unique(torch.cat(found)[:, 0]).numel() == 9


def test_clients_have_matrices_of_their_own() -> None:
    one, other = (Halves(random_codes(8, 16)).client._public.rows(0, 1, 5) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("kept_rows", [8, 1 << 14])
def test_transforms_and_operands_do_not_depend_on_what_was_asked_before(
    kept_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "KEPT_ROWS", kept_rows)
    grown = matrix()
    for features, rank in ((3, 5), (20, 5), (5, 6), (20, 6), (3, 5), (9, 5)):
        stored, values = grown.transformed(features, rank)
        wanted = grown._transforms.of_rows(grown.rows(0, features, stored), stored)
        assert stored >= rank
        # Whole packs of eight rows in the compiled form.
        whole = len(wanted) if grown._transforms.__class__ is TensorTransforms else features // 8
        assert torch.equal(values[:whole], wanted[:whole])
        operand = grown.operand(1, features, rank)
        assert torch.equal(join_bytes(operand), grown.rows(1, features, rank).double())
    grown.forget_operands()
    assert grown._operands[2] is None


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize(("outputs", "features"), [(131, 70), (8, 3), (1, 9), (5, 64)])
def test_hints_are_exact_products_rounded_to_24_bits(outputs: int, features: int, weight_bits: int) -> None:
    """Whatever the number of calls that bring the codes, and of rows, which packs of eight need not divide."""
    codes = random_codes(outputs, features, weight_bits)
    a = matrix().rows(0, max(outputs, features), 6).long()
    digits = [codes.long()]
    if weight_bits == 16:
        low = (codes.long() + 128) % 256 - 128
        digits = [low, (codes.long() - low) // 256]
    for step in (64, 131, 7):
        sets: dict[Direction, ParameterSet] = {"forward": NARROW, "backward": WIDE}
        halves = Halves(codes, client(weight_bits, sets), step)
        for direction in DIRECTIONS:
            ((first, packed),) = halves.client._prepared[halves.maps[direction].identity].hints.parts()
            assert first == 0
            n = sets[direction].dimension
            matrices = digits if direction == "forward" else [digit.t() for digit in digits]
            # Each digit's rows one below the other.
            want = torch.cat([digit @ a[: digit.shape[1], :n] for digit in matrices])
            got = (packed.permute(0, 3, 1, 2).reshape(-1, n, 3).long() * torch.tensor([1, 256, 65536])).sum(2)
            assert len(packed) == -(-len(want) // 8)
            assert torch.equal(got[: len(want)], ((want + 128) % 2**32) >> 8)
            assert not got[len(want) :].any(), "rows that complete a pack are zeros"


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_both_forms_pack_alike() -> None:
    values = torch.randint(-(2**31), 2**31, (21, 1280), dtype=torch.int32)
    values[0, :4] = torch.tensor([-1, 2**31 - 1, -(2**31), 127])
    packed = []
    for transforms in (NativeTransforms(), TensorTransforms(CPU)):
        hints = transforms.empty_hints(21, NARROW)
        # Three calls that meet within packs.
        for start, stop in ((0, 5), (13, 21), (5, 13)):
            transforms.pack(values[start:stop], start, hints)
        packed.append(hints)
    assert torch.equal(*packed)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("first", DIRECTIONS)
def test_directions_of_different_parameters_share_the_matrix(first: Direction) -> None:
    for sets in ({"forward": NARROW, "backward": WIDE}, {"forward": WIDE, "backward": NARROW}):
        halves = Halves(random_codes(30, 50), client(sets=sets))  # type: ignore[arg-type]
        for direction in (first, *DIRECTIONS):
            x = torch.randn(3, halves.maps[direction].in_features, generator=torch.Generator().manual_seed(0))
            assert error_of(halves.product(x, direction), halves.exact(x, direction)) < 2**-9


@pytest.mark.usefixtures("code")
def test_inputs_longer_than_the_kept_rows_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "KEPT_ROWS", 16)
    halves = Halves(random_codes(150, 40))
    for direction in DIRECTIONS:
        x = torch.randn(3, halves.maps[direction].in_features)
        assert error_of(halves.product(x, direction), halves.exact(x, direction)) < 2**-9
    assert halves.client._public._kept[0] == 0, "nothing is kept"


def test_nothing_is_encrypted_for_weights_that_were_not_read_to_the_end() -> None:
    halves = Halves(random_codes(8, 16), client())
    fresh: Any = client()
    preparation = fresh.preparation(halves.maps["forward"], halves.maps["backward"])
    preparation.absorb(0, halves.codes)
    for direction in DIRECTIONS:
        with pytest.raises(SecurityError, match="nothing was prepared"):
            fresh.encrypt(torch.randn(4, halves.maps[direction].in_features), halves.maps[direction])
    preparation.finish()
    assert fresh.preparation(halves.maps["forward"], halves.maps["backward"]) is None, "once is enough"
    assert fresh.encrypt(torch.randn(4, 16), halves.maps["forward"]).buffers["b"].shape == (16, 3, 4)


def test_what_preparing_needs_is_freed_by_the_first_product() -> None:
    halves = Halves(random_codes(8, 16))
    assert halves.client._public._operands[2] is not None
    halves.product(torch.randn(4, 16))
    assert halves.client._public._operands[2] is None
