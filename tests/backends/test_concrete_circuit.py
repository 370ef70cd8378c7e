"""The concrete-circuit backend: exact integer products in Concrete's circuits, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remote
import tiny
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import ciphertune
from ciphertune import session_of
from ciphertune.backend import Direction, LinearMap
from ciphertune.cache import IN_USE, Hold, entries, remove
from ciphertune.cli import cli
from ciphertune.client.choice import choose
from ciphertune.errors import (
    InputError,
    PluginError,
    ProtocolError,
    ReplyError,
    SecurityError,
    SelectionError,
    UnsupportedLayerError,
)
from ciphertune.planning.plan import make_plan
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.testing import BackendSuite
from ciphertune.testing.backends import Pair
from ciphertune.weights import LayerWeight
from ciphertune.worker import WeightStore, Worker

try:
    importlib.metadata.version("concrete-python")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("concrete-python is not installed (extra concrete-circuit)", allow_module_level=True)

from ciphertune_concrete.circuit import cache, library
from ciphertune_concrete.circuit.circuits import LinearCircuits
from ciphertune_concrete.circuit.params import MAX_FEATURES, reference
from ciphertune_concrete.circuit.worker import CircuitWorker

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("circuit"), pytest.mark.timeout(1200)]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _circuits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of their own for the tests, and worker processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIPHERTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield cache.cache_folder()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path))
    return tmp_path / "concrete-circuit"


class TestCircuit(BackendSuite):
    selection = "concrete-circuit"
    shapes = ((1, 1, 1), (1, 24, 3), (3, 17, 33))
    repeats = 24
    samples = 16
    steps = 6
    deterministic = True


class TestNarrow(BackendSuite):
    """Rounding is coarse here, and seen."""

    selection = "concrete-circuit?bits=18"
    shapes = ((2, 5, 7),)
    repeats = 12
    samples = 8
    steps = 6
    deterministic = True


class TestSimulated(BackendSuite):
    selection = "concrete-circuit?mode=simulate"
    deterministic = True


def around(codes: Tensor, to: str = "concrete-circuit") -> Pair:
    """Both halves around these codes."""
    backend = choose(to).backend
    client = backend.client(CPU)
    worker = type(backend).worker(client.open_fields(), client.evaluation_key(), CPU)
    weight = LayerWeight(codes, torch.ones(len(codes)))
    return Pair(backend, client, worker, weight, worker.prepare(codes))


def codes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_products_of_the_quantized_tokens_are_exact(bits: int, direction: Direction) -> None:
    both = around(codes_of(6, 9), f"concrete-circuit?bits={bits}")
    linear_map = both.map(direction)
    x = torch.randn(4, linear_map.in_features, generator=torch.Generator().manual_seed(1))
    encrypted = both.client.encrypt(x, linear_map)
    scale = both.backend.noise(linear_map).token_scale(x, linear_map)  # type: ignore[union-attr]
    quantized = (x.double() * scale[:, None]).round()
    assert float(quantized.abs().max()) < 2 ** (bits - 1)
    y = both.client.decrypt(both.evaluate(direction, encrypted.buffers), encrypted.state, linear_map)
    expected = (quantized @ both.matrix(direction).t()) / scale[:, None]
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize("sign", [1, -1])
def test_outputs_at_the_ends_of_the_range(sign: int) -> None:
    """A token along a row of the weight has the largest product there can be; half of the range is one of them."""
    codes = codes_of(5, 12)
    both = around(codes)
    x = sign * codes[:1].float()
    linear_map = both.map("forward")
    row = float(codes[0].double().norm())
    exact = dataclasses.replace(linear_map, max_norm=row)
    encrypted = both.client.encrypt(x, exact)
    y = both.client.decrypt(both.evaluate("forward", encrypted.buffers), encrypted.state, exact)
    assert float(y[0, 0]) * float(encrypted.state[0]) == pytest.approx(sign * 2**23, rel=1e-3)
    assert float(y[0, 0]) == pytest.approx(sign * row**2, rel=1e-4)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(3, 4, dtype=torch.int8),
        torch.full((3, 4), 127, dtype=torch.int8),
        torch.full((3, 4), -127, dtype=torch.int8),
        # Outputs that cancel for every input of the samples that circuits are traced with.
        torch.tensor([[5, -5, 0, 0], [1, 2, -3, 0], [0, 0, 0, 0]], dtype=torch.int8),
        torch.ones(1, 1, dtype=torch.int8),
    ],
    ids=["zeros", "largest", "smallest", "cancelling", "one"],
)
def test_weights_that_could_mislead_the_compiler(codes: Tensor) -> None:
    """Signs, widths and parameters follow from what was agreed, not from the weight."""
    both = around(codes)
    for direction in ("forward", "backward"):
        size = both.map(direction).in_features
        x = torch.linspace(-1, 2, 2 * size).reshape(2, size)
        y = both.product(direction, x)
        expected = x.double() @ both.matrix(direction).t()
        assert float((y - expected).abs().max()) <= 1e-4 * max(float(expected.abs().max()), 1e-3)


def test_the_largest_norm() -> None:
    """4096 inputs of the largest code: what the parameters were chosen for."""
    both = around(torch.full((1, MAX_FEATURES), 127, dtype=torch.int8))
    x = torch.randn(1, MAX_FEATURES, generator=torch.Generator().manual_seed(0))
    linear_map = both.map("forward")
    encrypted = both.client.encrypt(x, linear_map)
    y = both.client.decrypt(both.evaluate("forward", encrypted.buffers), encrypted.state, linear_map)
    quantized = (x.double() * encrypted.state[:, None]).round()
    assert float(y) == pytest.approx(127 * float(quantized.sum() / encrypted.state), rel=1e-6)
    assert both.backend.refuse(linear_map) is None


def test_keys_are_fresh_and_needed() -> None:
    """What one client encrypted, another one of the same parameters cannot read."""
    first, second = around(codes_of(4, 6)), around(codes_of(4, 6))
    x = torch.ones(1, 6)
    encrypted = first.client.encrypt(x, first.map("forward"))
    reply = second.evaluate("forward", encrypted.buffers)
    good = first.client.decrypt(reply, encrypted.state, first.map("forward"))
    bad = second.client.decrypt(reply, encrypted.state, first.map("forward"))
    assert float((good - x.double() @ first.matrix("forward").t()).abs().max()) < 1e-3 * float(good.abs().max())
    assert float((bad - good).abs().max()) > 0.01 * float(good.abs().max())


def test_evaluation_repeats_exactly_and_on_several_threads() -> None:
    """The library's circuits give wrong results when one is called twice at a time, so none is."""
    both = around(codes_of(16, 16))
    request = both.client.encrypt(torch.randn(12, 16), both.map("forward")).buffers
    expected = both.worker.evaluate(both.prepared, "forward", request)["y"]
    found: list[Tensor] = []

    def evaluate() -> None:
        found.extend(both.worker.evaluate(both.prepared, "forward", request)["y"] for _ in range(6))

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18
    assert all(torch.equal(y, expected) for y in found)


@pytest.fixture(scope="module")
def both() -> Pair:
    return around(codes_of(4, 6))


class TestRefusals:
    """What comes over the wire and is not what this backend sends."""

    def test_any_words_are_a_ciphertext(self, both: Pair) -> None:
        """Hostile words of the right shape decrypt to nonsense, and harm nothing."""
        generator = torch.Generator().manual_seed(0)
        linear_map = both.map("forward")
        encrypted = both.client.encrypt(torch.ones(2, 6), linear_map)
        extremes = (0, -1, -(1 << 63), (1 << 63) - 1)
        requests = [torch.full((2, 6, 3), value, dtype=torch.int64) for value in extremes]
        for _ in range(8):
            random = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 6, 3), generator=generator, dtype=torch.int64)
            requests.append(random)
        for request in requests:
            reply = both.worker.evaluate(both.prepared, "forward", {"x": request})
            assert torch.isfinite(both.client.decrypt(reply, encrypted.state, linear_map)).all()
            noise = torch.randint_like(reply["y"], -(1 << 63), (1 << 63) - 1)
            assert torch.isfinite(both.client.decrypt({"y": noise}, encrypted.state, linear_map)).all()

    @pytest.mark.parametrize("shape", [(2, 6), (2, 5, 3), (2, 6, 4), (0, 6, 3), (2, 6, 3, 1), (), (6, 3), (2, 3, 6)])
    def test_requests_of_another_shape(self, both: Pair, shape: tuple[int, ...]) -> None:
        with pytest.raises(ProtocolError, match=r"shape \(tokens, 6, 3\)"):
            both.worker.evaluate(both.prepared, "forward", {"x": torch.zeros(shape, dtype=torch.int64)})

    def test_replies_of_another_size(self, both: Pair) -> None:
        """One of other parameters has another number of words."""
        linear_map = both.map("forward")
        encrypted = both.client.encrypt(torch.ones(2, 6), linear_map)
        words = reference(28).parameters.reply_words
        with pytest.raises(ReplyError, match=r"layer \(forward\).*'y' int64"):
            both.client.decrypt({"y": torch.zeros(2, 4, words, dtype=torch.int64)}, encrypted.state, linear_map)

    def test_more_tokens_than_a_message_carries(self, both: Pair) -> None:
        """Refused before memory is taken for the reply, at either side."""
        wide = dataclasses.replace(both.map("forward"), out_features=4096)
        with pytest.raises(InputError, match="40 tokens are more than the 37"):
            both.client.encrypt(torch.ones(40, 6), wide)
        tokens = (1 << 31) // (8 * 4 * reference(24).parameters.reply_words) + 1
        with pytest.raises(ProtocolError, match="over the limit"):
            both.worker.evaluate(
                both.prepared, "forward", {"x": torch.zeros(1, dtype=torch.int64).expand(tokens, 6, 3)}
            )

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"library": "2.10.0"}, r"client has concrete-python 2\.10\.0 and this worker 2\.11"),
            ({"library": None}, "another version"),
            ({"library": "x" * 1000}, "another version"),
            ({"bits": 25}, "other parameters"),
            ({"bits": True}, "bits must be between 16 and 32"),
            ({"bits": 64}, "bits must be between 16 and 32"),
            ({"mode": "disable"}, "mode execute or simulate"),
            ({"dimension": 10}, "other parameters"),
            ({"dimension": 1733.0}, "other parameters"),
            ({"variance": 0.0}, "other parameters"),
        ],
    )
    def test_a_client_of_another_version(self, both: Pair, change: dict[str, Any], text: str) -> None:
        fields = {**both.client.open_fields(), **change}
        with pytest.raises(ProtocolError, match=text):
            CircuitWorker(fields)

    def test_an_evaluation_key(self, both: Pair) -> None:
        with pytest.raises(ProtocolError, match="no evaluation key"):
            type(both.backend).worker(both.client.open_fields(), {"key": torch.zeros(1)}, CPU)

    @pytest.mark.parametrize(
        ("weight", "text"),
        [
            (torch.ones(2, 2, dtype=torch.int16), "int8 weights"),
            (torch.ones(2, 2), "int8 weights"),
            (torch.ones(1, MAX_FEATURES + 1, dtype=torch.int8), "over the limit of 4096"),
        ],
    )
    def test_weights(self, both: Pair, weight: Tensor, text: str) -> None:
        with pytest.raises(ProtocolError, match=text):
            both.worker.prepare(weight)

    def test_weights_of_a_larger_norm_than_the_parameters_are_for(
        self, both: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Codes of 8 bits have none, so this is for a limit that is lower."""
        monkeypatch.setattr("ciphertune_concrete.circuit.worker.MAX_NORM", 200)
        with pytest.raises(ProtocolError, match="norm over 200"):
            both.worker.prepare(torch.tensor([[127, 127, 127]], dtype=torch.int8))
        with pytest.raises(ProtocolError, match="norm over 200"):
            both.worker.prepare(torch.tensor([[127], [127], [127]], dtype=torch.int8))


class TestCache:
    def make(self, codes: Tensor, to: str = "concrete-circuit") -> None:
        """Have the circuit of one direction."""
        around(codes, to).prepared.get("forward")

    def test_a_circuit_is_compiled_once(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.make(codes_of(3, 4))
        monkeypatch.setattr(LinearCircuits, "_compile", lambda *a: pytest.fail("it was compiled again"))
        self.make(codes_of(3, 4))
        # Backward, a weight is its transpose.
        around(codes_of(3, 4).t().contiguous()).prepared.get("backward")

    def test_nothing_is_compiled_before_it_is_needed(self, empty_cache: Path) -> None:
        both = around(codes_of(3, 4))
        assert not empty_cache.exists()
        both.product("backward", torch.ones(2, 3))
        assert len(list(empty_cache.iterdir())) == 1

    def test_what_names_a_circuit(self, empty_cache: Path) -> None:
        """Its weight, its shape, the accumulator and the mode."""
        for to, codes in (
            ("concrete-circuit", codes_of(3, 4)),
            ("concrete-circuit", codes_of(3, 4, seed=1)),
            ("concrete-circuit", codes_of(3, 4).reshape(4, 3)),
            ("concrete-circuit?bits=20", codes_of(3, 4)),
            ("concrete-circuit?mode=simulate", codes_of(3, 4)),
        ):
            self.make(codes, to)
            self.make(codes.clone(), to)
        assert len(list(empty_cache.iterdir())) == 5

    def test_only_the_owner_reads_it_and_nothing_is_left_over(self, empty_cache: Path, tmp_path: Path) -> None:
        self.make(codes_of(3, 4))
        assert empty_cache.stat().st_mode & 0o777 == 0o700
        (entry,) = empty_cache.iterdir()
        assert entry.stat().st_mode & 0o777 == 0o700
        assert {path.suffix for path in entry.iterdir() if path.name != IN_USE} <= {".so", ".dylib", ".json"}

    def test_a_folder_open_to_others(self, empty_cache: Path) -> None:
        empty_cache.mkdir(parents=True)
        empty_cache.chmod(0o770)
        with pytest.raises(PluginError, match="open to other users") as caught:
            self.make(codes_of(3, 4))
        assert str(empty_cache) not in str(caught.value), "the text goes to clients"

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path / "file"))
        with pytest.raises(PluginError, match="set CIPHERTUNE_CACHE"):
            self.make(codes_of(3, 4))

    @pytest.mark.parametrize("damage", ["library", "description", "facts", "nothing in it"])
    def test_a_damaged_circuit_is_compiled_again(self, empty_cache: Path, damage: str) -> None:
        self.make(codes_of(3, 4))
        (entry,) = empty_cache.iterdir()
        if damage == "nothing in it":
            for file in entry.iterdir():
                file.unlink()
        else:
            name = {"library": "sharedlib.so", "description": "program_info.concrete.params.json"}.get(damage)
            (entry / (name or "facts.json")).write_bytes(b"{}")
        both = around(codes_of(3, 4))
        x = torch.ones(1, 4)
        expected = x.double() @ both.matrix("forward").t()
        assert float((both.product("forward", x) - expected).abs().max()) < 1e-4 * float(expected.abs().max())

    def test_compiling_that_fails_leaves_nothing(self, empty_cache: Path) -> None:
        def broken(folder: Path) -> None:
            (folder / "half").write_text("")
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            cache.find_or_make("ab", broken)
        assert list(empty_cache.iterdir()) == []

    def test_a_circuit_that_does_not_compile(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*arguments: Any) -> Any:
            raise RuntimeError("NoParametersFound for [[1, 2, 3]]")

        monkeypatch.setattr("ciphertune_concrete.circuit.circuits.compiled", none)
        with pytest.raises(PluginError, match="4 inputs and 3 outputs") as caught:
            self.make(codes_of(3, 4))
        assert "[[1" not in str(caught.value)
        assert list(empty_cache.iterdir()) == []

    def test_two_that_compile_the_same(self, empty_cache: Path) -> None:
        def slower(folder: Path) -> None:
            cache.find_or_make("ab", lambda other: (other / "first").write_text("") and None)  # type: ignore[arg-type]
            (folder / "second").write_text("")

        place = cache.find_or_make("ab", slower)
        assert [path.name for path in place.iterdir() if path.name != IN_USE] == ["first"]
        assert [path.name for path in empty_cache.iterdir()] == ["ab"]

    def test_those_that_were_not_used_for_longest_go_for_new_ones(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CIPHERTUNE_CIRCUITS_MB", "1")

        def make(name: str, nbytes: int = 400_000) -> Path:
            return cache.find_or_make(name, lambda folder: (folder / "it").write_bytes(bytes(nbytes)) and None)  # type: ignore[arg-type]

        def there() -> set[str]:
            return {path.name for path in empty_cache.iterdir()}

        for age, name in ((300, "ab"), (200, "cd")):
            used = time.time() - age
            os.utime(make(name) / IN_USE, (used, used))
        make("ef")
        assert there() == {"cd", "ef"}
        # What a process has loaded stays; what is larger than the limit is kept, for it is needed now.
        held = Hold(empty_cache / "cd")
        make("01", 2_000_000)
        assert "cd" in there()
        held.close()
        make("23")
        assert "23" in there()
        assert "01" not in there() or "cd" not in there()
        monkeypatch.setenv("CIPHERTUNE_CIRCUITS_MB", "none")
        with pytest.raises(PluginError, match="CIPHERTUNE_CIRCUITS_MB"):
            make("45")

    def test_a_loaded_circuit_keeps_its_files(self, empty_cache: Path) -> None:
        both = around(codes_of(3, 4))
        both.prepared.get("forward")
        (entry,) = entries("concrete-circuit")
        assert not remove(entry)


class TestWithoutTheLibrary:
    @pytest.fixture(autouse=True)
    def _absent(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        real = importlib.metadata.version
        self.answer: str | None = None

        def version(name: str) -> str:
            if name != "concrete-python":
                return real(name)
            if self.answer is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return self.answer

        monkeypatch.setattr(importlib.metadata, "version", version)
        library.version.cache_clear()
        yield
        library.version.cache_clear()

    def test_the_client_is_told_what_a_worker_lacks(self) -> None:
        weight = LayerWeight(codes_of(3, 4), torch.ones(3))
        public = {"library": "2.11.0", "bits": 24, "mode": "execute", "dimension": 1733, "variance": 0.0}
        request = Message("open", {"backend": "concrete-circuit", "groups": [["layer"]], "public": public})
        reply = Worker(WeightStore.of({"layer": weight})).handle(request)
        assert reply.fields["code"] == "plugin"
        assert "concrete-python 2.11, which is not installed here" in reply.fields["message"]

    def test_another_release(self) -> None:
        self.answer = "2.10.0"
        with pytest.raises(PluginError, match=r"2\.11, and 2\.10\.0 is installed"):
            choose("concrete-circuit").backend.client(CPU).open_fields()


def test_setuptools_without_what_the_library_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")

    monkeypatch.setattr(library.importlib, "import_module", lacking)  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="setuptools<81"):
        library._load.__wrapped__()


_SIGNALS = """
import os, signal, warnings

warnings.simplefilter("ignore")
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))

def caught():
    # Without 32 and 33, which the C library takes for its own threads.
    return int(open("/proc/self/status").read().split("SigCgt:")[1].split()[0], 16) & ~(3 << 31)

before = caught()

import torch
from ciphertune.testing.backends import Pair

assert Pair.make("concrete-circuit", 3, 4).product("forward", torch.ones(1, 4)).shape == (1, 3)
assert before == caught(), (hex(before), hex(caught()))
os.kill(os.getpid(), signal.SIGTERM)
reader, writer = os.pipe()
os.close(reader)
try:
    os.write(writer, b"x")
except BrokenPipeError:
    got.append("pipe")
assert got == [signal.SIGTERM, "pipe"], got
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_stay_what_they_were() -> None:
    """The library takes fifteen signals for itself; a worker whose client hangs up would end with it."""
    ran = subprocess.run([sys.executable, "-c", _SIGNALS], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


_FAILS = """
import sys, torch
from ciphertune.testing.backends import Pair

Pair.make("concrete-circuit", 3, 4).product("forward", torch.ones(1, 4))
sys.exit(3)
"""


def test_a_process_that_has_compiled_ends_with_the_status_that_it_says() -> None:
    """The library's own handler, which Python calls in the end, would make it 0."""
    words = [sys.executable, "-W", "ignore", "-c", _FAILS]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 3, ran.stderr[-2000:]


@pytest.mark.parametrize("option", ["bits=15", "bits=33", "bits=x", "mode=disable", "width=3"])
def test_options_that_are_none(option: str) -> None:
    with pytest.raises(SelectionError):
        choose(f"concrete-circuit?{option}")


def test_simulation_says_that_it_protects_nothing() -> None:
    assert choose("concrete-circuit").backend.security.bits == 128
    assert not choose("concrete-circuit?mode=simulate").backend.security.encrypted
    with pytest.raises(SecurityError, match="does not encrypt"):
        choose("concrete-circuit+zmq://localhost:5555?mode=simulate")


def test_the_licence_is_mentioned_once() -> None:
    library._load.cache_clear()
    from ciphertune_concrete import licence

    licence.notice.cache_clear()
    with pytest.warns(licence.LicenceNotice, match="concrete-python is under the licence BSD-3-Clause-Clear"):
        library.fhe()
    library.fhe()


class Wide(nn.Module):
    """One layer that a circuit can take, and one that it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(6, 5)
        self.large = nn.Linear(5, MAX_FEATURES + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(self.small(x))


def test_layers_that_it_cannot_take_stop_outsourcing(recorder: Any) -> None:
    model = Wide()
    with pytest.raises(UnsupportedLayerError, match=r"large \(forward\): concrete-circuit refuses .* has 4096 of each"):
        ciphertune.outsource(model, "concrete-circuit", plugins=recorder.plugins)
    assert type(model.small) is nn.Linear
    assert recorder.opened == []
    # No worker was asked, for there is none.
    with pytest.raises(UnsupportedLayerError, match="large"):
        ciphertune.outsource(model, "concrete-circuit+zmq://127.0.0.1:9?insecure=1&connect_timeout=0.1")
    outsourced = ciphertune.outsource(model, "concrete-circuit", layers=["small"])
    assert outsourced(torch.ones(2, 6)).shape == (2, MAX_FEATURES + 1)
    session_of(outsourced).close()


def test_a_plan_lists_what_it_cannot_take(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 3000, "num_key_value_heads": 4}
    tiny.llama_config(architectures=["LlamaForCausalLM"], **sizes).save_pretrained(tmp_path)
    found = make_plan(str(tmp_path), "concrete-circuit", tokens=4, measure=False)
    # Two siblings of 3000 outputs are too many; one is not.
    assert sorted(found.refused) == [f"model.layers.{i}.mlp.gate_proj + model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert all("share_inputs=0" in why for why in found.refused.values())
    assert {kind.layers for kind in found.kinds} == {"q_proj+k_proj+v_proj", "o_proj", "down_proj"}
    assert found.outsourced == sum(kind.weights for kind in found.kinds)
    assert not any("gate_proj" in name for name in found.stays)
    apart = make_plan(str(tmp_path), "concrete-circuit?share_inputs=0", tokens=4, measure=False)
    assert apart.refused == {}
    assert apart.outsourced == found.outsourced + 2 * 2 * 64 * 3000
    assert make_plan(str(tmp_path), "mlwe", tokens=4, measure=False).refused == {}
    none = make_plan(str(tmp_path), "concrete-circuit", tokens=4, layers=["*gate_proj", "*up_proj"])
    assert (none.kinds, none.estimate, len(none.refused)) == ((), None, 2)
    shown = CliRunner().invoke(cli, ["plan", str(tmp_path), "--to", "concrete-circuit", "--no-measure"])
    assert shown.exit_code == 0
    assert "refused" in shown.output


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)).requires_grad_(False)


def train(model: Any, steps: int) -> list[float]:
    """Losses of a few steps of training the first layer, which stays."""
    model[0].requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    curve = []
    for _ in range(steps):
        x = torch.randn(4, 4, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_it_trains_through_worker_processes_and_survives_the_loss_of_one(tmp_path: Path) -> None:
    """Two replicas, of which each compiles or finds the same circuits: one key of the client's serves both."""
    layers = ["2", "4"]
    ciphertune.split(network(), tmp_path / "bundle", layers=layers)
    local = ciphertune.outsource(network(), "concrete-circuit", layers=layers)
    expected = train(local, 3)
    session_of(local).close()
    folder = tmp_path / "bundle" / "worker"
    offered = ("--insecure", "--backends", "concrete-circuit")
    with remote.worker(folder, *offered) as first, remote.worker(folder, *offered) as second:
        to = f"concrete-circuit+zmq://{first.address},{second.address}?insecure=1&timeout=60&connect_timeout=60"
        model = ciphertune.outsource(network(), to, layers=layers)
        session = session_of(model)
        recorded = []

        def killing(grad: Tensor) -> None:
            recorded.append(len(grad))
            if len(recorded) == 2:
                first.kill()

        model[1].register_full_backward_hook(lambda module, into, out: killing(out[0]))
        found = train(model, 3)
        session.close()
    # Rounding is the same wherever circuits run, and their products are exact.
    assert found == expected
    assert recorded == [4, 4, 4]


def test_large_products_may_take_longer() -> None:
    """More tokens, and larger circuits, which may have to be compiled first."""
    backend = choose("concrete-circuit").backend
    small = LinearMap("layer", "forward", 16, 16, 100.0)
    large = dataclasses.replace(small, in_features=1024, out_features=1024)
    assert backend.allowance(small, 1) < 0.1
    assert backend.allowance(large, 1) > 4
    assert backend.allowance(large, 64) > 300


def test_its_noise_can_be_simulated() -> None:
    linear_map = LinearMap("layer", "forward", 16, 16, 100.0)
    simulated, real = (choose(to).backend for to in ("simulation?of=concrete-circuit", "concrete-circuit"))
    assert simulated.noise(linear_map) == real.noise(linear_map)


def test_it_is_found_by_name() -> None:
    assert registry.load(registry.BACKENDS, "concrete-circuit").name == "concrete-circuit"
