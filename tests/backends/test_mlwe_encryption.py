"""Encryption, decryption, noise and keys of the mlwe backend."""

import dataclasses
import hashlib
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ciphertune.backend import LinearMap
from ciphertune.bench.kernel import bench_kernel
from ciphertune.errors import KeyFileError, PrecisionError, ReplyError, SecurityError, SelectionError
from ciphertune_mlwe import MLWEBackend, native
from ciphertune_mlwe.client import MLWEClient
from ciphertune_mlwe.engine import Engine, NativeEngine, TensorEngine
from ciphertune_mlwe.keys import MasterKey
from ciphertune_mlwe.params import PARAMETER_SETS

pytestmark = pytest.mark.usefixtures("two_threads")
CPU = torch.device("cpu")
SECRET = bytes(range(32))
PRECISIONS = [(16, 16), (24, 16), (24, 24), (32, 16), (32, 24), (32, 32)]
"""What replies may keep of the mask and of the body."""
ENGINES: list[type[Engine]] = [TensorEngine] + ([NativeEngine] if native.library() is not None else [])


def make(engine: type[Engine] | None = None, **options: str) -> tuple[MLWEBackend, Any, Any]:
    """A backend with both halves; on one particular engine with a key that does not change from run to run."""
    backend = MLWEBackend.from_text(options)
    client = backend.client(CPU)
    if engine is not None:
        client._engine = engine(MasterKey(backend.parameters, SECRET), CPU)  # type: ignore[attr-defined]
    return backend, client, MLWEBackend.worker(client.open_fields(), {}, CPU)  # type: ignore[return-value]


def problem(
    tokens: int, features: int, outputs: int, weight_bits: int = 8
) -> tuple[torch.Tensor, torch.Tensor, LinearMap]:
    """Random activations, integer weights and their map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=generator)
    top, dtype = (127, torch.int8) if weight_bits == 8 else (32639, torch.int16)
    weight = torch.randint(-top, top + 1, (outputs, features), dtype=dtype, generator=generator)
    norm = float(torch.linalg.vector_norm(weight.double(), dim=1).max())
    return x, weight, LinearMap("layer (forward)", "forward", features, outputs, norm)


def negacyclic(a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The product modulo X^256 + 1 in int64, all in the order that ciphertexts keep coefficients in."""
    full = np.convolve(np.concatenate([a[0::2], a[1::2]]), np.concatenate([s[0::2], s[1::2]]))
    product = full[:256] - np.append(full[256:], 0)
    return np.stack([product[:128], product[128:]], axis=1).reshape(-1)


def run(client: Any, worker: Any, x: torch.Tensor, weight: torch.Tensor, linear_map: LinearMap) -> torch.Tensor:
    """One product through both halves."""
    sent = client.encrypt(x, linear_map)
    reply = worker.evaluate(worker.prepare(weight), "forward", sent.buffers)
    result: torch.Tensor = client.decrypt(reply, sent.state, linear_map)
    return result


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("params", list(PARAMETER_SETS))
@pytest.mark.parametrize("request_bits", [24, 32])
@pytest.mark.parametrize(("reply_bits", "body_bits"), PRECISIONS)
@pytest.mark.parametrize("weight_bits", [8, 16])
def test_measured_noise_is_the_declared_noise(
    engine: type[Engine], params: str, request_bits: int, reply_bits: int, body_bits: int, weight_bits: int
) -> None:
    bits = {"request_bits": request_bits, "reply_bits": reply_bits, "body_bits": body_bits, "weight_bits": weight_bits}
    backend, client, worker = make(engine, params=params, **{name: str(value) for name, value in bits.items()})
    x, weight, linear_map = problem(300, 200, 150, weight_bits)
    y = run(client, worker, x, weight, linear_map).double()
    exact = x.double() @ weight.double().t()
    scale = backend.noise.token_scale(x, linear_map)
    encoded = (y - exact) * scale[:, None]
    # The client's float32 output adds its own rounding, which matters only where nothing else does.
    rounding = (exact * scale[:, None]).square().mean() * 2.0**-48 / 3
    norms = torch.linalg.vector_norm(weight.double(), dim=1)
    declared = (backend.noise.input_variance * norms**2 + backend.noise.returned_variance).mean() + rounding
    assert 0.93 < (encoded.square().mean() / declared).item() < 1.07
    # Balanced digits are not quite symmetric: what is rounded away has a mean of 1/500 of the kept digits' unit.
    assert abs(encoded.mean().item()) < 6.5 * declared.sqrt().item() / np.sqrt(encoded.numel())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("request_bits", [24, 32])
@pytest.mark.parametrize(("reply_bits", "body_bits"), [(32, 16), (32, 24)])
def test_what_rounding_the_body_adds(engine: type[Engine], request_bits: int, reply_bits: int, body_bits: int) -> None:
    bits = {"request_bits": str(request_bits), "reply_bits": str(reply_bits), "body_bits": str(body_bits)}
    backend, client, worker = make(engine, **bits)
    x, weight, linear_map = problem(300, 200, 150)
    sent = client.encrypt(x, linear_map)
    reply = worker.evaluate(worker.prepare(weight), "forward", sent.buffers)
    _, whole, fuller = make(engine, request_bits=str(request_bits), reply_bits="32", body_bits="32")
    exact = whole.decrypt(fuller.evaluate(fuller.prepare(weight), "forward", sent.buffers), sent.state, linear_map)
    added = (client.decrypt(reply, sent.state, linear_map).double() - exact) * sent.state.scale[:, None]
    # Both decryptions round to float32, which adds at most this.
    rounding = 2 * (exact * sent.state.scale[:, None]).double().square().mean().item() * 2.0**-48 / 3
    assert added.square().mean().item() == pytest.approx(backend.noise.output_variance, rel=0.07, abs=rounding)


@pytest.mark.parametrize(
    ("options", "mask", "body"),
    [
        ({}, 3, 2),
        ({"reply_bits": "16"}, 2, 2),
        ({"reply_bits": "32"}, 4, 2),
        ({"body_bits": "24"}, 3, 3),
        ({"reply_bits": "32", "body_bits": "32"}, 4, 4),
        ({"weight_bits": "16"}, 3, 3),
        ({"weight_bits": "16", "reply_bits": "32"}, 4, 4),
        ({"weight_bits": "16", "body_bits": "16"}, 3, 2),
    ],
)
def test_bytes_of_a_reply(options: dict[str, str], mask: int, body: int) -> None:
    backend, client, worker = make(**options)  # type: ignore[arg-type]
    x, weight, linear_map = problem(300, 40, 30, backend.weight_bits)
    sent = client.encrypt(x, linear_map)
    reply = worker.evaluate(worker.prepare(weight), "forward", sent.buffers)
    rows = 30 * backend.weight_bits // 8
    assert reply["a"].nbytes == rows * mask * 1280
    assert reply["b"].nbytes == rows * body * 300
    exact = x.double() @ weight.double().t()
    y = client.decrypt(reply, sent.state, linear_map)
    assert ((y - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 2**-8


@pytest.mark.slow
def test_the_defaults_cost_far_less_precision_than_the_weights_rounding() -> None:
    for features, worst in ((768, 2**-11), (8192, 2**-8)):
        eight = bench_kernel("mlwe", 64, features, 64, 1)
        assert eight["relative_rms_error_quantized_weight"] < worst
        assert eight["relative_rms_error_quantized_weight"] < eight["relative_rms_error"] / 6
        assert bench_kernel("mlwe?weight_bits=16", 64, features, 64, 1)["relative_rms_error"] < worst / 2


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_that_reach_the_bound_do_not_wrap(engine: type[Engine]) -> None:
    _, client, worker = make(engine)
    _, weight, linear_map = problem(1, 96, 64)
    # Cauchy-Schwarz holds with equality for tokens along a row of the weight.
    x = torch.cat([weight.float() * 1e-6, -weight.float() * 1e6, torch.zeros(2, 96)])
    exact = x.double() @ weight.double().t()
    y = run(client, worker, x, weight, linear_map).double()
    assert (y[128:].abs() < 1e-25).all(), "a token of zeros must not decode to noise"
    assert ((y - exact).abs()[:64].amax() / exact[:64].abs().amax()) < 1e-4
    assert ((y - exact).abs()[64:128].amax() / exact[64:128].abs().amax()) < 1e-4


@pytest.mark.parametrize("scale", [1e-32, 1e-20, 1e20, 1e30])
def test_tokens_of_any_magnitude_keep_their_precision(scale: float) -> None:
    _, client, worker = make()
    x, weight, linear_map = problem(5, 64, 32)
    exact = (x * scale).double() @ weight.double().t()
    y = run(client, worker, x * scale, weight, linear_map).double()
    assert (y - exact).square().mean().sqrt() <= 2e-3 * exact.square().mean().sqrt()


@pytest.mark.parametrize("tokens", [1, 7, 255, 256, 257, 600])
@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_tokens(engine: type[Engine], tokens: int) -> None:
    _, client, worker = make(engine)
    x, weight, linear_map = problem(tokens, 33, 19)
    exact = x.double() @ weight.double().t()
    y = run(client, worker, x, weight, linear_map)
    assert y.shape == (tokens, 19)
    assert ((y - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 2**-11


def test_padding_hides_the_number_of_tokens_and_changes_nothing_else() -> None:
    _, client, worker = make(pad_tokens="64")
    x, weight, linear_map = problem(70, 40, 30)
    sent = client.encrypt(x, linear_map)
    assert sent.buffers["b"].shape == (40, 4, 128)
    y = client.decrypt(worker.evaluate(worker.prepare(weight), "forward", sent.buffers), sent.state, linear_map)
    exact = x.double() @ weight.double().t()
    assert y.shape == (70, 30)
    assert ((y - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 2**-11


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("params", list(PARAMETER_SETS))
@pytest.mark.parametrize("planes", [3, 4])
@pytest.mark.parametrize("tokens", [1, 300])
def test_both_engines_make_the_same_ciphertexts(params: str, planes: int, tokens: int) -> None:
    key = MasterKey(PARAMETER_SETS[params], SECRET)
    portable, compiled = TensorEngine(key, CPU), NativeEngine(key, CPU)
    torch.manual_seed(tokens)
    x, scale = torch.randn(tokens, 77), torch.rand(tokens, dtype=torch.float64) * 2**22
    one = portable.encrypt(x, scale, bytes(32), SECRET, planes)
    two = compiled.encrypt(x, scale, bytes(32), SECRET, planes)
    assert torch.equal(one, two)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("params", list(PARAMETER_SETS))
@pytest.mark.parametrize(("reply_bits", "body_bits"), PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 300])
def test_both_engines_decrypt_to_the_same_bits(params: str, reply_bits: int, body_bits: int, tokens: int) -> None:
    key = MasterKey(PARAMETER_SETS[params], SECRET)
    torch.manual_seed(tokens)
    unit = torch.rand(tokens, dtype=torch.float64)
    a = torch.randint(-128, 128, (29, reply_bits // 8, key.parameters.dimension), dtype=torch.int8)
    b = torch.randint(-128, 128, (29, body_bits // 8, tokens), dtype=torch.int8)
    assert torch.equal(TensorEngine(key, CPU).decrypt(a, b, unit), NativeEngine(key, CPU).decrypt(a, b, unit))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("params", "digest"),
    [
        ("mlwe-1280", "a6b230f10d235034c135b554b911af1842a92d71d95b027ff4f3586dd489801d"),
        ("mlwe-1536", "3ef6b81399e0e4ba0bf2642e96729d94be9f044d0be0f4ddea58558d86050e5a"),
    ],
)
def test_known_answers(engine: type[Engine], params: str, digest: str) -> None:
    key = MasterKey(PARAMETER_SETS[params], SECRET)
    x = (torch.arange(300 * 20, dtype=torch.float32).view(300, 20) % 97 - 48) / 16
    scale = torch.arange(1, 301, dtype=torch.float64) * 1000.5
    b = engine(key, CPU).encrypt(x, scale, bytes(range(32, 64)), bytes(range(64, 96)), 4)
    assert hashlib.sha256(b.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("reply_bits", "body_bits"), PRECISIONS)
def test_decryption_is_exact_integer_arithmetic(engine: type[Engine], reply_bits: int, body_bits: int) -> None:
    key, tokens = MasterKey(PARAMETER_SETS["mlwe-1280"], SECRET), 260
    generator = torch.Generator().manual_seed(reply_bits + body_bits)
    a = torch.randint(-128, 128, (3, reply_bits // 8, 1280), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (3, body_bits // 8, tokens), dtype=torch.int8, generator=generator)

    def lifted(planes: torch.Tensor) -> np.ndarray:
        powers = torch.tensor([256 ** (4 - planes.shape[1] + i) for i in range(planes.shape[1])])
        return (planes.long() * powers[:, None]).sum(1).numpy()

    masks = np.zeros((3, 512), dtype=np.int64)
    ring = lifted(a).reshape(3, 5, 256)
    for block in range(2):
        secret = key.secret_block(block).long().numpy()
        for row, part in np.ndindex(3, 5):
            masks[row, block * 256 : (block + 1) * 256] += negacyclic(ring[row, part], secret[part])
    phase = (lifted(b) - masks[:, :tokens] + 2**31) % 2**32 - 2**31
    y = engine(key, CPU).decrypt(a, b, torch.ones(tokens, dtype=torch.float64))
    assert torch.equal(y.t(), torch.from_numpy(phase).to(torch.float32))


def test_every_ciphertext_has_a_fresh_seed_and_fresh_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    system = os.urandom

    def recorded(count: int) -> bytes:
        drawn.append(system(count))
        return drawn[-1]

    _, client, _ = make()
    x, _, linear_map = problem(4, 16, 8)
    monkeypatch.setattr(os, "urandom", recorded)
    sent = [client.encrypt(x, linear_map) for _ in range(50)]
    seeds = [bytes(message.buffers["seed"].numpy().tobytes()) for message in sent]
    assert len(set(seeds)) == 50
    # One draw for the public seed and another for the errors, each from the operating system, none used twice.
    assert len(drawn) == len(set(drawn)) == 100
    assert set(seeds) <= set(drawn)
    bodies = {hashlib.sha256(message.buffers["b"].numpy().tobytes()).hexdigest() for message in sent}
    assert len(bodies) == 50


def test_without_randomness_nothing_is_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(count: int) -> bytes:
        raise NotImplementedError

    _, client, _ = make()
    x, _, linear_map = problem(4, 16, 8)
    monkeypatch.setattr(os, "urandom", broken)
    with pytest.raises(SecurityError, match="randomness"):
        client.encrypt(x, linear_map)


@pytest.mark.parametrize("engine", ENGINES)
def test_ciphertexts_look_uniform_whatever_the_message(engine: type[Engine]) -> None:
    _, client, _ = make(engine)
    for x in (torch.zeros(256, 64), torch.ones(256, 64), 1e6 * torch.eye(64).repeat(4, 1)):
        linear_map = LinearMap("layer", "forward", 64, 8, 1000.0)
        b = client.encrypt(x, linear_map).buffers["b"]
        for plane in range(4):
            counts = torch.bincount(b[:, plane].reshape(-1).long() + 128, minlength=256).double()
            expected = b[:, plane].numel() / 256
            statistic = ((counts - expected) ** 2 / expected).sum().item()
            assert abs(statistic - 255) < 6 * np.sqrt(2 * 255)


def test_secrets_are_in_no_buffer_repr_or_pickle() -> None:
    key = MasterKey(PARAMETER_SETS["mlwe-1280"], SECRET)
    client = MLWEClient(key, MLWEBackend().noise, 32, 24, 16, 1, CPU)
    x, _, linear_map = problem(300, 64, 8)
    message = client.encrypt(x, linear_map)
    crossing = b"".join(t.contiguous().numpy().tobytes() for t in message.buffers.values())
    crossing += repr(client.open_fields()).encode() + repr(client.evaluation_key()).encode()
    block = key.secret_block(0).to(torch.int8).numpy().tobytes()
    for secret in (SECRET, SECRET.hex().encode(), block[:64]):
        assert secret not in crossing
    for shown in (repr(key), repr(client), repr(message), repr(message.state), str(vars(message.state).keys())):
        assert SECRET.hex() not in shown
        assert repr(SECRET)[2:20] not in shown
    assert "hidden" in repr(key)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(key)


@pytest.mark.skipif(os.name != "posix", reason="file modes are posix")
def test_key_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    key = MasterKey.generate(PARAMETER_SETS["mlwe-1280"])
    path = tmp_path / "client.key"
    previous = os.umask(0)
    try:
        key.save(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert torch.equal(MasterKey.load(path, key.parameters).secret_block(3), key.secret_block(3))
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        MasterKey.generate(key.parameters).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        MasterKey.load(path, key.parameters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("{}", "damaged"),
        ('{"format": "ciphertune-mlwe-key-1", "parameters": "mlwe-1280", "secret": "00"}', "32 bytes"),
        ('{"format": "ciphertune-mlwe-key-1", "parameters": "mlwe-1280", "secret": "zz"}', "damaged"),
        ('{"format": "other", "parameters": "mlwe-1280", "secret": "00"}', "format"),
        ('{"format": "ciphertune-mlwe-key-1", "parameters": "mlwe-9", "secret": ""}', "does not know"),
    ],
)
def test_damaged_key_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "client.key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=message):
        MasterKey.load(path, PARAMETER_SETS["mlwe-1280"])


def test_a_key_of_another_parameter_set_and_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    MLWEBackend.from_text({"key": str(path)}).client(CPU)
    MLWEBackend.from_text({"key": str(path)}).client(CPU)
    with pytest.raises(KeyFileError, match=r"mlwe-1280.*params=mlwe-1280"):
        MLWEBackend.from_text({"key": str(path), "params": "mlwe-1536"}).client(CPU)
    with pytest.raises(KeyFileError, match="FileNotFoundError"):
        MasterKey.load(tmp_path / "none", PARAMETER_SETS["mlwe-1280"])


def test_a_client_with_a_saved_key_decrypts_what_another_with_it_sent(tmp_path: Path) -> None:
    options = {"key": str(tmp_path / "client.key")}
    _, first, worker = make(**options)  # type: ignore[arg-type]
    _, second, _ = make(**options)  # type: ignore[arg-type]
    _, stranger, _ = make()
    x, weight, linear_map = problem(10, 50, 20)
    sent = first.encrypt(x, linear_map)
    reply = worker.evaluate(worker.prepare(weight), "forward", sent.buffers)
    exact = x.double() @ weight.double().t()
    error = (second.decrypt(reply, sent.state, linear_map) - exact).square().mean().sqrt()
    assert error / exact.square().mean().sqrt() < 2**-11
    wrong = (stranger.decrypt(reply, sent.state, linear_map) - exact).square().mean().sqrt()
    assert wrong / exact.square().mean().sqrt() > 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "dtype", "planes", "body planes"])
def test_replies_that_cannot_belong_to_the_request(damage: str) -> None:
    _, client, worker = make()
    x, weight, linear_map = problem(10, 50, 20)
    sent = client.encrypt(x, linear_map)
    reply = worker.evaluate(worker.prepare(weight), "forward", sent.buffers)
    if damage == "missing":
        del reply["a"]
    elif damage == "truncated":
        reply["b"] = reply["b"][:, :, :-1]
    elif damage == "dtype":
        reply["b"] = reply["b"].to(torch.int16)
    elif damage == "body planes":
        # As a worker answers that does not know the option.
        reply["b"] = torch.zeros(20, 3, 10, dtype=torch.int8)
    else:
        reply["a"] = reply["a"][:, :2]
    with pytest.raises(ReplyError, match=r"layer \(forward\): expected buffer"):
        client.decrypt(reply, sent.state, linear_map)


def test_products_beyond_the_precision_of_32_bits_are_refused() -> None:
    backend = MLWEBackend.from_text({"request_bits": "24"})
    fine = LinearMap("fine", "forward", 8192, 8192, 73 * 8192**0.5)
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
        {"body_bits": "20"},
        {"body_bits": "32"},
        {"body_bits": "24", "reply_bits": "16"},
        {"params": "mlwe-1"},
        {"pad_tokens": "0"},
        {"weight_bits": "4"},
        {"colour": "1"},
    ],
)
def test_wrong_options(options: dict[str, str]) -> None:
    with pytest.raises(SelectionError, match=next(iter(options))):
        MLWEBackend.from_text(options)


def test_sixteen_bit_weights_are_as_exact_as_eight_bit_ones() -> None:
    _, client, worker = make(weight_bits="16")
    x, weight, linear_map = problem(20, 60, 40, weight_bits=16)
    y = run(client, worker, x, weight, linear_map)
    exact = x.double() @ weight.double().t()
    assert ((y - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 2**-11
