"""Encryption, decryption and noise of the mlwe backend, by compiled loops and by tensor operations."""

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from mlwe_halves import CPU, Halves, error_of, negacyclic, random_codes

from ciphertune.backend import DIRECTIONS, Direction, LinearMap
from ciphertune.bench.kernel import bench_kernel
from ciphertune.errors import PrecisionError, ReplyError, SecurityError, SelectionError
from ciphertune_mlwe import MLWEBackend, native
from ciphertune_mlwe.params import NARROW, PARAMETER_SETS, WIDE, ParameterSet, parameters_of
from ciphertune_mlwe.prg import expand, room, ternary
from ciphertune_mlwe.public import PublicMatrix
from ciphertune_mlwe.transforms import NativeTransforms, TensorTransforms, Transforms

pytestmark = pytest.mark.usefixtures("two_threads")
SETS = [NARROW, WIDE]
MADE: list[Callable[[], Transforms]] = [lambda: TensorTransforms(CPU)]
if native.library() is not None:
    MADE.append(NativeTransforms)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("width", ["24", "32"])
@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_measured_noise_is_the_declared_noise(width: str, weight_bits: int, direction: Direction) -> None:
    halves = Halves(random_codes(150, 200, weight_bits), request_bits=width)
    linear_map = halves.maps[direction]
    x = torch.randn(300, linear_map.in_features, generator=torch.Generator().manual_seed(1))
    noise = halves.backend.noise(linear_map)
    scale = noise.token_scale(x, linear_map)
    encoded = (halves.product(x, direction).double() - halves.exact(x, direction)) * scale[:, None]
    # The client's float32 output adds its own rounding, which matters only where nothing else does.
    rounding = (halves.exact(x, direction) * scale[:, None]).square().mean() * 2.0**-48 / 3
    norms = torch.linalg.vector_norm(halves.matrix(direction).double(), dim=1)
    declared = (noise.input_variance * norms**2 + noise.returned_variance).mean() + rounding
    assert 0.93 < (encoded.square().mean() / declared).item() < 1.07
    assert abs(encoded.mean().item()) < 6.5 * declared.sqrt().item() / np.sqrt(encoded.numel())


@pytest.mark.parametrize(("width", "planes"), [("24", 3), ("32", 4)])
@pytest.mark.parametrize("weight_bits", [8, 16])
def test_requests_and_replies_carry_their_own_tokens_and_nothing_else(
    width: str, planes: int, weight_bits: int
) -> None:
    halves = Halves(random_codes(30, 40, weight_bits), request_bits=width)
    for tokens in (1, 300):
        sent = halves.client.encrypt(torch.randn(tokens, 40), halves.maps["forward"])
        reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), "forward", sent.buffers)
        assert {name: buffer.nbytes for name, buffer in sent.buffers.items()} == {"b": planes * 40 * tokens}
        assert {name: buffer.nbytes for name, buffer in reply.items()} == {"y": planes * 30 * weight_bits // 8 * tokens}


@pytest.mark.slow
def test_the_defaults_cost_no_more_precision_than_the_weights_rounding() -> None:
    for features, worst in ((768, 2**-8.5), (4096, 2**-6.4), (8192, 2**-11)):
        eight = bench_kernel("mlwe", 64, features, 64, 1)
        assert eight["relative_rms_error_quantized_weight"] < worst
        assert eight["relative_rms_error"] < 1.5 * 2**-6.7
        assert bench_kernel("mlwe?weight_bits=16", 64, features, 64, 1)["relative_rms_error"] < 2**-9


def test_parameters_follow_sizes_norms_and_weight_bits_alone() -> None:
    def of(features: int, weight_bits: int = 8, width: int | None = None) -> ParameterSet:
        # Gaussian weights: the largest of a row is 3.3 to 3.7 deviations away.
        norm = 127 / 3.5 * features**0.5
        return parameters_of(LinearMap("layer", "forward", features, 64, norm), weight_bits, width)

    assert [of(features) for features in (1, 576, 1536, 4096)] == [NARROW] * 4
    assert [of(features) for features in (8192, 14336, 49152)] == [WIDE] * 3
    assert of(576, weight_bits=16) is WIDE
    assert (of(576, width=32), of(14336, width=24)) == (WIDE, NARROW)
    wide = dataclasses.replace(LinearMap("layer", "forward", 4096, 64, 127 * 64.0))
    assert parameters_of(wide, 8, None) is WIDE, "norms count beside sizes"


@pytest.mark.usefixtures("code")
def test_tokens_that_reach_the_bound_do_not_wrap() -> None:
    codes = random_codes(64, 96)
    # Cauchy-Schwarz holds with equality for tokens along a row of the weight.
    x = torch.cat([codes.float() * 1e-6, -codes.float() * 1e6, torch.zeros(2, 96)])
    halves = Halves(codes)
    exact, y = halves.exact(x), halves.product(x).double()
    assert (y[128:].abs() < 1e-25).all(), "a token of zeros must not decode to noise"
    assert ((y - exact).abs()[:64].amax() / exact[:64].abs().amax()) < 1e-3
    assert ((y - exact).abs()[64:128].amax() / exact[64:128].abs().amax()) < 1e-3


@pytest.mark.parametrize("scale", [1e-32, 1e-20, 1e20, 1e30])
def test_tokens_of_any_magnitude_keep_their_precision(scale: float) -> None:
    halves = Halves(random_codes(32, 64))
    x = torch.randn(5, 64) * scale
    # Norms under 1e-30 are scaled as if they were that large.
    assert error_of(halves.product(x), halves.exact(x)) <= (1e-2 if scale < 1e-30 else 1e-3)


@pytest.mark.usefixtures("code")
def test_any_number_of_tokens() -> None:
    halves = Halves(random_codes(19, 33))
    for tokens in (1, 7, 127, 128, 129, 255, 256, 257, 600):
        x = torch.randn(tokens, 33)
        y = halves.product(x)
        assert y.shape == (tokens, 19)
        assert error_of(y, halves.exact(x)) < 2**-9


def test_padding_hides_the_number_of_tokens_and_changes_nothing_else() -> None:
    halves = Halves(random_codes(30, 40), pad_tokens="64")
    x = torch.randn(70, 40)
    assert halves.client.encrypt(x, halves.maps["forward"]).buffers["b"].shape == (40, 3, 128)
    assert halves.product(x).shape == (70, 30)
    assert error_of(halves.product(x), halves.exact(x)) < 2**-9


def ones(values: np.ndarray) -> np.ndarray:
    """Number of ones in every value."""
    return np.vectorize(lambda value: int(value).bit_count())(values)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("parameters", SETS)
@pytest.mark.parametrize("tokens", [3, 260])
def test_masks_and_ciphertexts_are_exact_integer_arithmetic(
    made: Callable[[], Transforms], parameters: ParameterSet, tokens: int
) -> None:
    transforms = made()
    features, blocks = 11, -(-tokens // 256)
    public = PublicMatrix(bytes(range(32)), b"model", transforms)
    secrets = transforms.secrets(bytes(32), parameters, blocks)
    mask = torch.empty(features, tokens, dtype=torch.int32)
    transforms.masks(public.transformed(features, parameters.rank), secrets, parameters, bytes(range(64, 96)), mask)
    a = public.rows(0, features, parameters.rank).numpy().astype(np.int64).reshape(features, parameters.rank, 256)
    s = ternary(bytes(32), blocks * parameters.dimension).astype(np.int64).reshape(blocks, parameters.rank, 256)
    inner = np.stack(
        [
            np.concatenate([sum(negacyclic(a[k, r], s[j, r]) for r in range(parameters.rank)) for j in range(blocks)])
            for k in range(features)
        ]
    )[:, :tokens]
    row_bytes = parameters.error_row_bytes(tokens)
    size = features * row_bytes
    stream = expand(bytes(range(64, 96)), 0, features, row_bytes, np.empty(room(size), dtype=np.uint8))[:size]
    stream = stream.reshape(features, row_bytes)
    if parameters.error == "byte":
        error = stream[:, :tokens].astype(np.int64)
    else:
        words = np.ascontiguousarray(stream[:, : 4 * tokens]).view("<u4")
        halves = np.ascontiguousarray(stream[:, 4 * tokens : 6 * tokens]).view("<u2") & 0x3FF
        error = ones(words) + ones(halves) - 21
    assert torch.equal(mask.long() % 2**32, torch.from_numpy((inner + error) % 2**32))
    x = torch.randn(tokens, features)
    scale = torch.rand(tokens, dtype=torch.float64) * 2**22
    b = transforms.encrypt(mask, x, scale, parameters.planes).numpy().astype(np.int64)
    message = np.round((x.double() * scale[:, None]).numpy().T).astype(np.int64)
    sent = ((inner + error + message) % 2**32) >> (32 - parameters.width)
    assert np.array_equal((b * 256 ** np.arange(parameters.planes)[:, None]).sum(1), sent)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("parameters", SETS)
def test_decryption_is_exact_integer_arithmetic(made: Callable[[], Transforms], parameters: ParameterSet) -> None:
    transforms, rows, tokens = made(), 13, 260
    generator = torch.Generator().manual_seed(parameters.width)
    hint = torch.randint(-(2**31), 2**31, (rows, parameters.dimension), dtype=torch.int32, generator=generator)
    packed = transforms.empty_hints(rows, parameters)
    # In two calls that meet within a pack.
    transforms.pack(hint[:5], 0, packed)
    transforms.pack(hint[5:], 5, packed)
    secrets = transforms.secrets(bytes(32), parameters, 2)
    masks = torch.empty(rows, tokens, dtype=torch.int32)
    transforms.hint_masks(packed, secrets, parameters, masks)
    s = ternary(bytes(32), 2 * parameters.dimension).astype(np.int64).reshape(2, parameters.rank, 256)
    kept = ((hint.numpy().astype(np.int64) + 128) >> 8 << 8).reshape(rows, parameters.rank, 256)
    want = np.stack(
        [
            np.concatenate([sum(negacyclic(kept[i, r], s[j, r]) for r in range(parameters.rank)) for j in range(2)])
            for i in range(rows)
        ]
    )[:, :tokens]
    assert torch.equal(masks.long() % 2**32, torch.from_numpy(want % 2**32))
    reply = torch.randint(0, 256, (rows, parameters.planes, tokens), dtype=torch.uint8, generator=generator)
    lifted = (reply.long() * (256 ** torch.arange(4 - parameters.planes, 4))[:, None]).sum(1).numpy()
    phase = (lifted - want + 2**31) % 2**32 - 2**31
    unit = torch.arange(1, tokens + 1) / 4
    wanted = (torch.from_numpy(phase).to(torch.float32) * unit).t()
    for mask in (masks, masks.t().contiguous().t()):
        y = torch.full((tokens, rows + 2), 7.0)
        transforms.decrypt(reply, mask, unit, y[:, 1:-1])
        assert torch.equal(y[:, 1:-1], wanted)
        assert (y[:, [0, -1]] == 7).all()
    few = reply[:, :, :5].contiguous()
    transforms.decrypt(few, masks[:, :5], unit[:5], y[:5, 1:-1])
    assert torch.equal(y[:5, 1:-1], wanted[:5])


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("features", [1, 31, 32, 577])
def test_norms_are_those_of_float64_whatever_the_size_of_values(made: Callable[[], Transforms], features: int) -> None:
    x = torch.randn(9, features + 3, generator=torch.Generator().manual_seed(features))[:, 1:-2]
    x = x * torch.tensor([1e-38, 1e-30, 1e-20, 1e-3, 0, 1, 1e10, 1e20, 1e37])[:, None]
    found = made().norms(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x.double().square().sum(1).sqrt(), rtol=1e-13, atol=0)
    assert found[4] == 0


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("tokens", [1, 3, 65, 300])
@pytest.mark.parametrize("by_columns", [False, True])
def test_tokens_are_encoded_by_their_norms(made: Callable[[], Transforms], tokens: int, by_columns: bool) -> None:
    """In one call or in several, the scale of a token is that of ``NoiseModel.token_scale``."""
    generator = torch.Generator().manual_seed(tokens)
    transforms, features = made(), 120
    x = torch.randn(tokens, features + 3, generator=generator)[:, 2:-1] * torch.logspace(-35, 3, tokens)[:, None]
    x[tokens // 2] = 0
    mask = torch.randint(-(1 << 31), 1 << 31, (features, tokens), dtype=torch.int32, generator=generator)
    mask = mask.t().contiguous().t() if by_columns else mask
    linear_map = dataclasses.replace(Halves(random_codes(8, features)).maps["forward"], max_norm=900.0)
    for parameters in SETS:
        noise = parameters.noise(1)
        scale = noise.token_scale(x, linear_map, transforms.norms(x))
        b, unit = transforms.encode(mask, x, noise.encoded_norm(linear_map), parameters.planes)
        assert torch.equal(b, transforms.encrypt(mask, x, scale, parameters.planes))
        assert torch.equal(unit, scale.reciprocal().float())
        assert float(scale[tokens // 2]) > 1e35, "a token of zeros decodes to zeros"


def test_known_answers() -> None:
    digests = []
    for make in MADE:
        transforms = make()
        for parameters in SETS:
            public = PublicMatrix(bytes(range(32)), b"", transforms)
            secrets = transforms.secrets(bytes(range(32, 64)), parameters, 2)
            mask = torch.empty(20, 300, dtype=torch.int32)
            values = public.transformed(20, parameters.rank)
            transforms.masks(values, secrets, parameters, bytes(range(64, 96)), mask)
            x = (torch.arange(300 * 20, dtype=torch.float32).view(300, 20) % 97 - 48) / 16
            b = transforms.encrypt(mask, x, torch.arange(1, 301, dtype=torch.float64) * 1000.5, parameters.planes)
            digests.append((parameters.name, hashlib.sha256(b.numpy().tobytes()).hexdigest()))
    assert set(digests) == {
        ("mlwe-1280", "f0d530401000cc4cdcff33972c6f91d0cceb934596351636fbf77b08e70bbae5"),
        ("mlwe-1536", "26b35b0793c1d34f2562bd8ef252b7987a75172e1451b50ac898ac024515f19a"),
    }


def test_no_secret_and_no_error_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves(random_codes(8, 16), banks="0")
    drawn: list[bytes] = []
    system = os.urandom

    def recorded(count: int) -> bytes:
        drawn.append(system(count))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", recorded)
    x = torch.randn(4, 16)
    sent = [halves.client.encrypt(x, halves.maps["forward"]) for _ in range(50)]
    seeds = [each for each in drawn if len(each) == 32]
    # One draw for the secret and another for the errors of every request.
    assert len(set(seeds)) == len(seeds) == 100
    bodies = {hashlib.sha256(message.buffers["b"].numpy().tobytes()).hexdigest() for message in sent}
    assert len(bodies) == 50


def test_without_randomness_nothing_is_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(count: int) -> bytes:
        raise NotImplementedError

    halves = Halves(random_codes(8, 16))
    monkeypatch.setattr("ciphertune_mlwe.prg.os.urandom", broken)
    monkeypatch.setattr("ciphertune_mlwe.mask_memory.os", os)
    with pytest.raises((SecurityError, NotImplementedError)):
        halves.client.encrypt(torch.randn(4, 16), halves.maps["forward"])


def test_nothing_is_encrypted_for_weights_that_were_not_read() -> None:
    halves = Halves(random_codes(8, 16))
    other = dataclasses.replace(halves.maps["forward"], identity="other")
    with pytest.raises(SecurityError, match="nothing was prepared"):
        halves.client.encrypt(torch.randn(4, 16), other)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("width", ["24", "32"])
def test_ciphertexts_look_uniform_whatever_the_message(width: str) -> None:
    halves = Halves(random_codes(8, 64), request_bits=width)
    for x in (torch.zeros(256, 64), torch.ones(256, 64), 1e6 * torch.eye(64).repeat(4, 1)):
        b = halves.client.encrypt(x, halves.maps["forward"]).buffers["b"]
        for plane in range(b.shape[1]):
            counts = torch.bincount(b[:, plane].reshape(-1).long(), minlength=256).double()
            expected = b[:, plane].numel() / 256
            statistic = ((counts - expected) ** 2 / expected).sum().item()
            assert abs(statistic - 255) < 6 * np.sqrt(2 * 255)


def test_secrets_are_in_no_buffer_repr_or_pickle() -> None:
    halves = Halves(random_codes(8, 64))
    x = torch.full((1, 64), 0.7310585)
    message = halves.client.encrypt(x, halves.maps["forward"])
    for shown in (repr(halves.client), repr(message), repr(message.state)):
        assert "0.73" not in shown
        assert "tensor(" not in shown
    with pytest.raises(SecurityError, match="copied"):
        pickle.dumps(message.state.masks[0])


@pytest.mark.parametrize("made", MADE)
def test_nothing_secret_stays_with_the_transforms(
    made: Callable[[], Transforms], monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = Halves(random_codes(20, 50))
    transforms, secrets = made(), []
    draw = transforms.secrets

    def drawn(seed: bytes, parameters: ParameterSet, blocks: int) -> torch.Tensor:
        secrets.append(draw(seed, parameters, blocks))
        assert secrets[-1].abs().sum() > 0
        return secrets[-1]

    monkeypatch.setattr(transforms, "secrets", drawn)
    monkeypatch.setattr(halves.client, "_transforms", transforms)
    monkeypatch.setattr(halves.client._public, "_transforms", transforms)
    halves.product(torch.ones(3, 50))
    (secret,) = secrets
    assert torch.count_nonzero(secret) == 0
    if isinstance(transforms, TensorTransforms):
        assert transforms._scratch._buffers
        assert not any(int(torch.count_nonzero(buffer)) for buffer in transforms._scratch._buffers.values())


@pytest.mark.parametrize("damage", ["missing", "truncated", "dtype", "planes", "rows"])
def test_replies_that_cannot_belong_to_the_request(damage: str) -> None:
    halves = Halves(random_codes(20, 50))
    sent = halves.client.encrypt(torch.randn(10, 50), halves.maps["forward"])
    reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), "forward", sent.buffers)
    y = reply["y"]
    damaged = {
        "missing": {},
        "truncated": {"y": y[:, :, :-1]},
        "dtype": {"y": y.to(torch.int16)},
        "planes": {"y": torch.cat([y, y[:, :1]], dim=1)},
        "rows": {"y": y[:-1]},
    }
    with pytest.raises(ReplyError, match=r"layer \(forward\)"):
        halves.client.decrypt(damaged[damage], sent.state, halves.maps["forward"])


def test_products_beyond_the_precision_of_32_bits_are_refused() -> None:
    backend = MLWEBackend.from_text({"request_bits": "24"})
    fine = LinearMap("fine", "forward", 8192, 8192, 36 * 8192**0.5)
    backend.refuse_imprecise(fine)
    beyond = LinearMap("beyond", "backward", 131072, 4096, 127 * 131072**0.5)
    with pytest.raises(PrecisionError, match="beyond: with 131072 inputs"):
        backend.refuse_imprecise(beyond)
    MLWEBackend().refuse_imprecise(beyond)
    with pytest.raises(PrecisionError):
        MLWEBackend().refuse_imprecise(dataclasses.replace(beyond, max_norm=2.0**40))


@pytest.mark.parametrize(
    "options",
    [
        {"request_bits": "20"},
        {"pad_tokens": "0"},
        {"weight_bits": "4"},
        {"mask_memory": "0"},
        {"banks": "perhaps"},
        {"colour": "1"},
    ],
)
def test_wrong_options(options: dict[str, str]) -> None:
    with pytest.raises(SelectionError, match=next(iter(options))):
        MLWEBackend.from_text(options)


def test_security_is_stated_under_three_cost_models() -> None:
    statement = MLWEBackend().security
    assert statement.bits == 130.2 == min(each.security_bits for each in PARAMETER_SETS)
    for figure in ("MATZOV 156", "core-SVP classical 130.2", "core-SVP quantum 118.8", "n = 1536"):
        assert figure in statement.assumption


@pytest.mark.slow
def test_the_script_that_estimates_security_says_what_it_needs() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "estimate.py"
    done = warm.script(script)
    if done.returncode == 0:
        for parameters in SETS:
            assert done.stdout.count(parameters.name) == len(parameters.estimates)
    else:
        assert "this needs SageMath and lattice-estimator" in done.stderr
        assert "Traceback" not in done.stderr
