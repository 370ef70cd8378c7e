"""The concrete-glwe backend: the suite, keys and their file, hostile bytes, its error and the simulation of it."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from click.testing import CliRunner
from torch import Tensor, nn

import ciphertune
from ciphertune.backend import Backend, LinearMap
from ciphertune.cli import cli
from ciphertune.client.choice import choose
from ciphertune.errors import KeyFileError, PluginError, PrecisionError, ProtocolError, ReplyError, WorkerError
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.testing import BackendSuite
from ciphertune.testing.backends import Pair
from ciphertune.weights import quantize
from ciphertune.worker import SessionLimits, WeightStore, Worker
from ciphertune.worker.process import worker_process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("glwe"), pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_it_can_be_simulated_and_planned_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "concrete_ml_extensions", None)
    model = ciphertune.outsource(nn.Sequential(nn.Linear(6, 4)), "simulation?of=concrete-glwe", layers="all")
    assert model(torch.ones(3, 6)).shape == (3, 4)
    ciphertune.session_of(model).close()
    backend = choose("concrete-glwe").backend
    assert backend.traffic(LinearMap("layer", "forward", 2049, 4097, 100.0), 3) == (3 * 2 * 10000, 3 * 8 * 4161)
    assert backend.diagnose(CPU).keys() == {"not usable"}
    with pytest.raises(PluginError, match=r'concrete-ml-extensions.*pip install "ciphertune\[concrete-glwe\]"'):
        backend.client(CPU)


def test_the_security_statement_says_what_it_knows() -> None:
    security = choose("concrete-glwe").backend.security
    assert security.encrypted
    assert security.bits == 133.1
    assert "n = 2048" in security.assumption
    assert "binary secret" in security.assumption


library = pytest.importorskip("concrete_ml_extensions", reason='needs pip install "ciphertune[concrete-glwe]"')

from ciphertune_concrete.glwe import (  # noqa: E402
    keys as key_module,
    params,
    wire,
    worker as worker_module,
)
from ciphertune_concrete.glwe.keys import key_pair  # noqa: E402
from ciphertune_concrete.glwe.library import panics_are  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One key for all tests here, where backends look for it by default."""
    folder = tmp_path_factory.mktemp("home") / "keys"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CIPHERTUNE_KEYS", str(folder))
        # Held, so that no test has to read it again, nor the worker's form of it be made again.
        client = choose("concrete-glwe").backend.client(CPU)
        backend = registry.load(registry.BACKENDS, "concrete-glwe")
        worker = backend.worker(client.open_fields(), client.evaluation_key(), CPU)
        yield folder
        worker.close()
        client.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair.make("concrete-glwe", 5, 7)
    yield made
    made.close()


class TestGlwe(BackendSuite):
    selection = "concrete-glwe"
    # Time goes by tokens times outputs.
    shapes = ((1, 1, 1), (2, 5, 3), (6, 70, 4))
    samples = 4
    width = 4
    steps = 4

    @pytest.fixture
    def pair(self, request: pytest.FixtureRequest) -> Iterator[Callable[..., Pair]]:
        """As the suite's, with few outputs where it has 24."""
        made: list[Pair] = []
        most = 10 if request.function.__name__ == "test_a_part_of_the_rows" else 4  # rows from the eighth on

        def make(out_features: int, in_features: int) -> Pair:
            made.append(
                Pair.make(self.selection, min(out_features, most) if in_features == 40 else out_features, in_features)
            )
            return made[-1]

        yield make
        for each in made:
            each.close()


class TestSimulatedGlwe(BackendSuite):
    selection = "simulation?of=concrete-glwe"


def test_the_licence_is_in_the_tables() -> None:
    rows = json.loads(CliRunner().invoke(cli, ["backends", "--json"]).output)
    licences = {row["name"]: row["licence"] for row in rows}
    assert "patent licence from Zama" in licences["concrete-glwe"]
    assert licences["mlwe"] == ""
    assert "patent licence from Zama" in licences["concrete-circuit"]


def test_the_parameters_are_the_librarys_own() -> None:
    assert json.loads(library.default_params()) == params.PARAMETERS


def test_inputs_of_several_ciphertexts() -> None:
    both = Pair.make("concrete-glwe", 2, 4100)
    x = torch.randn(2, 4100, generator=torch.Generator().manual_seed(0))
    y, expected = both.product("forward", x), x.double() @ both.matrix("forward").t()
    assert float((y - expected).norm() / expected.norm()) < 1e-4
    both.close()


def test_outputs_of_several_ciphertexts() -> None:
    both = Pair.make("concrete-glwe", 3, 2050)
    g = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    y, expected = both.product("backward", g), g.double() @ both.matrix("backward").t()
    assert y.shape == (1, 2050)
    assert float((y - expected).norm() / expected.norm()) < 1e-4
    assert float((y[0, 2048:] - expected[0, 2048:]).norm() / expected[0, 2048:].norm()) < 1e-4
    both.close()


def test_a_map_too_large_for_any_precision() -> None:
    backend = choose("concrete-glwe").backend
    backend.refuse_imprecise(LinearMap("layer", "forward", 1 << 17, 8, 127.0 * math.sqrt(1 << 17)))
    with pytest.raises(PrecisionError, match="layer"):
        backend.refuse_imprecise(LinearMap("layer", "forward", 1 << 36, 8, 127.0 * math.sqrt(1 << 36)))


# Keys and their file.


def test_a_key_is_made_once_and_kept(keys: Path) -> None:
    file = keys / key_module.FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in keys.iterdir()] == [file.name], "nothing half-written remains"
    assert key_pair(keys) is key_pair(keys), "one pair in memory serves all"
    for text in (repr(key_pair(keys)), repr(choose("concrete-glwe").backend.client(CPU))):
        assert "tensor" not in text
    with pytest.raises(TypeError, match="pickled"):
        key_pair(keys).__reduce__()


def test_a_kept_key_is_the_same_key(keys: Path, pair: Pair) -> None:
    x = torch.randn(2, 7)
    encrypted = pair.client.encrypt(x, pair.map("forward"))
    reply = pair.evaluate("forward", encrypted.buffers)
    key_module._loaded.clear()
    another = choose("concrete-glwe").backend.client(CPU)
    y = another.decrypt(reply, encrypted.state, pair.map("forward"))
    assert float((y - x.double() @ pair.matrix("forward").t()).abs().max()) < 0.1


def test_threads_that_need_a_key_at_once_make_one(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(file: Path) -> None:
        made.append(file)
        file.parent.mkdir()
        os.link(keys / key_module.FILE, file)

    monkeypatch.setattr(key_module, "_make", make)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(key_pair(tmp_path / "new"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def altered(keys: Path, folder: Path, change: Any) -> Path:
    """A folder with a key file whose bytes were changed."""
    content = bytearray((keys / key_module.FILE).read_bytes())
    folder.mkdir()
    file = folder / key_module.FILE
    file.touch(mode=0o600)
    file.write_bytes(change(content))
    return folder


def _other_parameters(content: bytearray) -> bytes:
    header = json.loads(content[:1024])
    header["parameters"]["polynomial_size"] = 4096
    return json.dumps(header).encode().ljust(1024) + content[1024:]


def _flipped(place: int) -> Any:
    def change(content: bytearray) -> bytearray:
        content[place] ^= 1
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "cut short"),
        (lambda content: content[:5000], "cut short"),
        (lambda content: b"", "damaged"),
        (lambda content: content + b"more", "cut short|bytes, not"),
        (_flipped(2000), "checksum"),
        (_flipped(-9), "checksum"),
        (_flipped(1), "damaged|format"),
        (lambda content: b'{"format": "other", "parameters": {}, "sha256": ""}', "format 'other'"),
        (_other_parameters, "polynomial_size=4096 instead of 2048"),
    ],
    ids=["one byte short", "cut", "empty", "longer", "secret", "compression key", "header", "format", "parameters"],
)
def test_key_files_that_are_none(tmp_path: Path, keys: Path, change: Any, message: str) -> None:
    folder = altered(keys, tmp_path / "keys", change)
    with pytest.raises(KeyFileError, match=message) as caught:
        choose(f"concrete-glwe?keys={folder}").backend.client(CPU)
    assert str(folder) in str(caught.value)


def test_a_key_that_others_can_read(tmp_path: Path, keys: Path) -> None:
    folder = altered(keys, tmp_path / "keys", lambda content: content)
    (folder / key_module.FILE).chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        key_pair(folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="cannot make the folder"):
        key_pair(tmp_path / "file" / "keys")


# What comes over a wire.


@pytest.mark.parametrize(
    "key",
    [
        {},
        {"key": torch.zeros(params.KEY_WORDS - 1, dtype=torch.int64)},
        {"key": torch.zeros(params.KEY_WORDS, dtype=torch.int32)},
        {"key": torch.zeros(3, dtype=torch.int64), "more": torch.zeros(1)},
    ],
    ids=["none", "cut short", "other type", "two"],
)
def test_compression_keys_that_are_none(key: dict[str, Tensor]) -> None:
    with pytest.raises(ProtocolError, match="compression key"):
        registry.load(registry.BACKENDS, "concrete-glwe").worker({"parameters": params.NAME}, key, CPU)


def test_any_values_are_ciphertexts(pair: Pair) -> None:
    """A request, a key or a reply of random bytes gives wrong results, and neither error nor crash."""
    linear_map, generator = pair.map("forward"), torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randint(-(1 << 63), (1 << 63) - 1, like.shape, generator=generator)

    encrypted = pair.client.encrypt(torch.ones(2, 7), linear_map)
    for _ in range(3):
        reply = pair.evaluate("forward", {name: random(t) for name, t in encrypted.buffers.items()})
        assert torch.isfinite(pair.client.decrypt(reply, encrypted.state, linear_map)).all()
        forged = {"values": random(reply["values"])}
        assert torch.isfinite(pair.client.decrypt(forged, encrypted.state, linear_map)).all()
    key = {"key": random(torch.empty(params.KEY_WORDS))}
    other = type(pair.backend).worker({"parameters": params.NAME}, key, CPU)
    reply = other.evaluate(other.prepare(pair.weight.codes), "forward", encrypted.buffers)
    y = pair.client.decrypt(reply, encrypted.state, linear_map)
    assert torch.isfinite(y).all()
    assert float((y - pair.matrix("forward").sum(1)).abs().max()) > 1, "another key gives other results"


@pytest.mark.parametrize("tokens", [0, 3])
def test_tokens_and_seeds_must_agree(pair: Pair, tokens: int) -> None:
    request = dict(pair.client.encrypt(torch.ones(2, 7), pair.map("forward")).buffers)
    request["seeds"] = torch.zeros(tokens, 1, 2, dtype=torch.int64)
    with pytest.raises(ProtocolError, match="seeds"):
        pair.worker.evaluate(pair.prepared, "forward", request)


@pytest.mark.parametrize("kind", ["EncryptedMatrix", "CompressedResultEncryptedMatrix", "CpuCompressionKey"])
def test_panics_of_the_library_are_errors(kind: str) -> None:
    for junk in (b"", b"junk", b"\xff" * 4000):
        with pytest.raises(ReplyError, match="said clearly"), panics_are(ReplyError, "said clearly"):
            getattr(library, kind).deserialize(junk)
    with pytest.raises(KeyboardInterrupt), panics_are(ReplyError, "not this"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["request_bytes", "reply_bytes", "key_bytes"])
def test_bytes_that_the_library_cannot_read(pair: Pair, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    linear_map = pair.map("forward")
    encrypted = pair.client.encrypt(torch.ones(1, 7), linear_map)
    reply = pair.evaluate("forward", encrypted.buffers)
    monkeypatch.setattr(wire, where, lambda *_: b"nonsense")
    key = {"key": torch.ones(params.KEY_WORDS, dtype=torch.int64)}
    calls: dict[str, Callable[[], Any]] = {
        "request_bytes": lambda: pair.worker.evaluate(pair.prepared, "forward", encrypted.buffers),
        "reply_bytes": lambda: pair.client.decrypt(reply, encrypted.state, linear_map),
        "key_bytes": lambda: type(pair.backend).worker({"parameters": params.NAME}, key, CPU),
    }
    with pytest.raises(ProtocolError, match="cannot"):
        calls[where]()


@pytest.mark.parametrize("outputs", [1, 3, 64, 2047, 2048, 2049, 4096, 4097])
def test_replies_survive_the_librarys_form(outputs: int) -> None:
    values = torch.randint(-(1 << 63), (1 << 63) - 1, (2, sum(params.reply_words(outputs))))
    blob = wire.reply_bytes(values, outputs)
    again = library.CompressedResultEncryptedMatrix.deserialize(blob).serialize()
    assert again == blob
    assert torch.equal(wire.reply_values(again, 2, outputs), values)
    for place in (0, 8, 16, len(blob) - 8):
        wrong = bytearray(blob)
        wrong[place] ^= 64
        with pytest.raises(PluginError, match="lays out"):
            wire.reply_values(bytes(wrong), 2, outputs)
    for wrong in (blob[:-8], blob[:-1], blob[:16], b""):  # type: ignore[assignment]
        with pytest.raises(PluginError, match="lays out"):
            wire.reply_values(bytes(wrong), 2, outputs)


@pytest.mark.parametrize("features", [1, 2048, 2049])
def test_requests_survive_the_librarys_form(features: int) -> None:
    shape = (3, params.input_blocks(features))
    values, seeds = (torch.randint(-(1 << 63), (1 << 63) - 1, (*shape, n)) for n in (params.REQUEST_WORDS, 2))
    blob = wire.request_bytes(values, seeds, features)
    again = library.EncryptedMatrix.deserialize(blob).serialize()
    assert again == blob
    read = wire.request_buffers(again, 3, features)
    assert torch.equal(read["values"], values)
    assert torch.equal(read["seeds"], seeds)
    for wrong in (blob[:-8], b"", bytes([blob[0] ^ 1]) + blob[1:]):
        with pytest.raises(PluginError, match="lays out"):
            wire.request_buffers(wrong, 3, features)


def test_a_product_ends_with_its_session(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    product, calls = pair.worker._product, []  # type: ignore[attr-defined]

    def last(*arguments: Any) -> Tensor:
        calls.append(1)
        pair.worker.close()
        found: Tensor = product(*arguments)
        return found

    monkeypatch.setattr(pair.worker, "_product", last)
    encrypted = pair.client.encrypt(torch.ones(3, 7), pair.map("forward"))
    with pytest.raises(ProtocolError, match="closed while"):
        pair.worker.evaluate(pair.prepared, "forward", encrypted.buffers)
    assert len(calls) == 1


def test_cuda_is_used_where_there_is_one(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that says it has a device: its calls and its longer replies, not the device itself."""
    uploads = []

    class Device:
        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def is_cuda_available(self) -> bool:
            return True

        class CudaCompressionKey:
            deserialize = staticmethod(library.CpuCompressionKey.deserialize)

        def make_cuda_clear_matrix(self, data: Any, key: Any) -> Any:
            uploads.append(data.shape)
            return data

        def cuda_matrix_multiplication(self, encrypted: Any, data: Any, key: Any) -> Any:
            found = library.cpu_matrix_multiplication(encrypted, data, key).serialize()
            outputs = data.shape[1]
            values = wire.reply_values(found, 2, outputs)
            full = torch.zeros(2, sum(params.reply_words(2048)), dtype=torch.int64)
            full[:, : values.shape[1]] = values
            return library.CompressedResultEncryptedMatrix.deserialize(wire.reply_bytes(full, 2048))

    monkeypatch.setattr(worker_module, "load", Device)
    half = type(pair.backend).worker(pair.client.open_fields(), pair.client.evaluation_key(), CPU)
    prepared, x = half.prepare(pair.weight.codes), torch.randn(2, 7)
    for _ in range(2):
        encrypted = pair.client.encrypt(x, pair.map("forward"))
        reply = half.evaluate(prepared, "forward", encrypted.buffers)
        y = pair.client.decrypt(reply, encrypted.state, pair.map("forward"))
        assert float((y - x.double() @ pair.matrix("forward").t()).abs().max()) < 0.1
    assert uploads == [(7, 5)], "a weight is brought to the device once"


# At a worker.


def small_store() -> WeightStore:
    return WeightStore.of({"0": quantize(torch.randn(4, 6), 8)})


def opening() -> Message:
    client = choose("concrete-glwe").backend.client(CPU)
    fields = {"backend": "concrete-glwe", "public": dict(client.open_fields()), "groups": [["0"]]}
    return Message("open", fields, client.evaluation_key())


def test_a_worker_without_the_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    request = opening()
    monkeypatch.setitem(sys.modules, "concrete_ml_extensions", None)
    reply = Worker(small_store()).handle(request)
    assert reply.fields["code"] == "plugin"
    assert 'pip install "ciphertune[concrete-glwe]"' in reply.fields["message"]
    assert "concrete-ml-extensions" in reply.fields["message"]


def test_the_client_hears_what_the_worker_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Worker.handle

    def without(self: Worker, request: Message, peer: str = "") -> Message:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "concrete_ml_extensions", None)
            return handle(self, request, peer)

    monkeypatch.setattr(Worker, "handle", without)
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(WorkerError, match=r'concrete-ml-extensions.*pip install "ciphertune\[concrete-glwe\]"'):
        ciphertune.outsource(model, "concrete-glwe", layers="all")
    assert isinstance(model[0], nn.Linear), "the model is as it was"


def test_keys_at_a_worker_are_limited() -> None:
    worker = Worker(small_store(), limits=SessionLimits(nbytes=200_000_000))
    replies = [worker.handle(opening(), "alice") for _ in range(2)]
    assert replies[0].kind == "ok"
    assert replies[1].fields["code"] == "quota"
    assert "134 MB of keys" in replies[1].fields["message"]
    assert worker.session_bytes == 8 * params.KEY_WORDS


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    ciphertune.split(model, tmp_path / "bundle")
    return model, tmp_path / "bundle" / "worker"


_PLAIN = ("127.0.0.1:*", {"insecure": "1"})
"""Where a worker listens, and how."""


def test_a_worker_process_with_little_room_for_keys(bundle: tuple[nn.Module, Path]) -> None:
    model, folder = bundle
    full = pytest.raises(WorkerError, match=r"134 MB of keys .* 0 of 105 MB")
    with worker_process(folder, "zmq", *_PLAIN, ["--max-key-mb", "100"]) as (address, _), full as caught:
        ciphertune.outsource(model, f"concrete-glwe+zmq://{address}?insecure=1", layers=["0"])
    assert caught.value.code == "quota"


def test_a_worker_process_without_the_package(
    bundle: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = bundle
    absent = "raise ModuleNotFoundError(\"No module named 'concrete_ml_extensions'\", name='concrete_ml_extensions')\n"
    (tmp_path / "concrete_ml_extensions.py").write_text(absent)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with worker_process(folder, "zmq", *_PLAIN) as (address, _):
        with pytest.raises(WorkerError, match=r'is not installed.*pip install "ciphertune\[concrete-glwe\]"') as caught:
            ciphertune.outsource(model, f"concrete-glwe+zmq://{address}?insecure=1", layers=["0"])
        assert address in str(caught.value)
        # It serves other backends all the same.
        ciphertune.outsource(model, f"mlwe+zmq://{address}?insecure=1", layers=["0"])
        assert model(torch.ones(1, 6)).shape == (1, 2)
        ciphertune.session_of(model).close()
    assert caught.value.code == "plugin"


# Its error.


def errors(backend: Backend, to: str, tokens: int) -> Tensor:
    """Errors of a product in units of an encoded value, (tokens, 5)."""
    both = Pair.make(to, 5, 30)
    x = torch.randn(tokens, 30, generator=torch.Generator().manual_seed(7))
    y = both.product("forward", x).double()
    noise = backend.noise(both.map("forward"))
    assert noise is not None
    scale = noise.token_scale(x, both.map("forward"))
    both.close()
    return (y - x.double() @ both.matrix("forward").t()) * scale[:, None]


def test_the_simulation_has_its_error() -> None:
    """Variance, and what a token's outputs have in common."""
    backend = choose("concrete-glwe").backend
    real = errors(backend, "concrete-glwe", 64)
    simulated = errors(backend, "simulation?of=concrete-glwe&seed=3", 4000)
    noise = backend.noise(LinearMap("layer", "forward", 30, 5, 127 * math.sqrt(30)))
    assert noise is not None
    variance = noise.error_deviation(127 * math.sqrt(30)) ** 2
    # Of 64 tokens with correlated outputs, the mean square has a relative deviation of about 0.1.
    assert float(simulated.square().mean()) == pytest.approx(variance, rel=0.1)
    assert float(real.square().mean()) == pytest.approx(variance, rel=0.5)
    assert abs(float(real.mean())) < 0.5 * math.sqrt(variance)

    def shared(error: Tensor) -> float:
        total, own = error.sum(1).square().mean(), error.square().sum(1).mean()
        return float((total - own) / (error.shape[1] - 1) / own)

    assert shared(simulated) == pytest.approx(noise.correlation, abs=0.1)
    assert shared(real) == pytest.approx(noise.correlation, abs=0.3)


# The whole framework.


def check_circles(result: dict[str, Any], steps: int) -> None:
    assert result["losses"] == pytest.approx(result["losses_in_the_clear"], rel=0.1, abs=0.02)
    assert len(result["losses"]) == steps
    assert result["traffic"]["requests"] == 3 * steps


@pytest.mark.parametrize("to", ["concrete-glwe", "mlwe", "mlwe+zmq://"])
def test_circles(to: str) -> None:
    """The example trains by changing one string, and stays near what it does in the clear."""
    steps, points = (2, 2) if "glwe" in to else (20, 8)
    result = runpy.run_path(str(ROOT / "examples" / "circles.py"))["run"](to, steps, points, 1)
    check_circles(result, steps)
    if steps == 20:
        assert result["accuracy_before"] < 0.85
        assert result["accuracy"] > 0.95


def test_circles_as_a_command() -> None:
    options = ["--to", "concrete-glwe+zmq://", "--steps", "2", "--batch", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = warm.script(ROOT / "examples" / "circles.py", *options, preload=warm.CLIENT, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    check_circles(json.loads(run.stdout), 2)
    assert "commercial use needs a patent licence" in run.stderr
