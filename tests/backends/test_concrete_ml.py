"""The backend on Concrete ML; most of it needs an environment of its own (`make concrete-ml`)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.backend import LinearMap
from ciphertune.client.choice import choose
from ciphertune.errors import PluginError, ProtocolError, ReplyError, SecurityError, SelectionError, WorkerError
from ciphertune.testing import BackendSuite
from ciphertune.testing.backends import Pair
from ciphertune_concrete.ml.library import load, require
from ciphertune_concrete.ml.wire import is_reply, request_tokens

EXECUTOR = "concrete.ml.quantization.linear_op_glwe_backend"
ROOT = Path(__file__).parents[2]


def missing() -> bool:
    try:
        metadata.version("concrete-ml")
    except metadata.PackageNotFoundError:
        return True
    return False


needs_concrete_ml = pytest.mark.skipif(
    missing(), reason='needs pip install "ciphertune[concrete-ml]" in an environment of its own: make concrete-ml'
)
# Its progress bars warn that they are experimental, and tracing a weight that it knows to be constant warns.
quiet = pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning") if not missing() else lambda f: f


@pytest.fixture(scope="module")
def keys() -> Any:
    """A key pair for the whole module: making one takes seconds."""
    executor = load().GLWELinearLayerExecutor()
    executor.keygen()
    return executor.private_key, executor.compression_key


@pytest.fixture
def same_keys(keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client of a test gets the module's keys."""

    def keygen(executor: Any) -> None:
        executor.private_key, executor.compression_key = keys

    monkeypatch.setattr(load().GLWELinearLayerExecutor, "keygen", keygen)


# The quantized modules' two roundings to 8 bits: 0.4% of a normal input each where a token has 64 features.
@needs_concrete_ml
class TestDisable(BackendSuite):
    selection = "concrete-ml?mode=disable"
    tolerance = 0.02


@needs_concrete_ml
class TestSimulate(BackendSuite):
    selection = "concrete-ml?mode=simulate"
    tolerance = 0.02


@needs_concrete_ml
@pytest.mark.usefixtures("same_keys")
class TestExecute(BackendSuite):
    selection = "concrete-ml"
    tolerance = 0.02
    shapes: ClassVar = ((1, 1, 1), (1, 64, 3), (3, 17, 5))
    repeats: ClassVar = 24
    # An output value takes 15 ms.
    samples, width, steps = 4, 8, 4


# Parity with Concrete ML's own trainer.


class Network(nn.Module):
    """Points of the plane, as cosines of random projections, through linear layers without a bias.

    Concrete ML hands a batch's targets to the model too.
    """

    def __init__(self, sizes: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(2, sizes[0]))
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=bias) for k, n in itertools.pairwise(sizes))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x = torch.cos(x @ self.projection)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)[:, :2]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and batches, the same every time.

    Attributes:
        sizes: of the network's layers.
        bias: whether they have one.
        steps, batch: of training.
    """

    sizes: tuple[int, ...]
    bias: bool = False
    steps: int = 20
    batch: int = 8

    def model(self) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        network = Network(self.sizes, self.bias).requires_grad_(False)
        targets = [f"layers.{i}" for i in range(len(self.sizes) - 1)]
        return get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=targets))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        from sklearn.datasets import make_circles

        x, y = make_circles(self.steps * self.batch, noise=0.05, factor=0.4, random_state=0)
        points, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
        return list(zip(points.split(self.batch), targets.split(self.batch), strict=True))

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def theirs(self, folder: Path, fhe: str, dynamic: bool, any_size: bool = False) -> list[float]:
        """Losses of Concrete ML's trainer; ``any_size`` lifts its limit of 512 features for the GLWE executor."""
        model = self.model()
        trainer = require("concrete.ml.torch.lora").LoraTrainer(
            model,
            self.optimizer(model),
            nn.functional.cross_entropy,
            n_layers_to_skip_for_backprop=1,
            train_log_path=str(folder / "training.log"),
            eval_steps=1000,
        )
        if any_size:
            trainer.hybrid_model._has_only_large_linear_layers = True
        batches = self.batches()
        trainer.compile(batches[0], n_bits=8, use_dynamic_quantization=dynamic)
        trainer.train(batches, fhe=fhe)
        for handler in trainer.logger.handlers:
            handler.close()
        trainer.logger.handlers.clear()
        return trainer.get_training_losses()

    def ours(self, to: str | None) -> list[float]:
        """Losses of CipherTune's trainer; None for the clear model."""
        model = self.model()
        if to is not None:
            model = ciphertune.outsource(model, to, layers=[f"layers.{i}" for i in range(len(self.sizes) - 1)])
        trainer = ciphertune.LoraTrainer(
            model,
            optimizer=self.optimizer(model),
            loss_fn=nn.functional.cross_entropy,
            max_grad_norm=None,
            require_outsourced=to is not None,
        )
        history = trainer.train(self.batches())
        if to is not None:
            ciphertune.session_of(model).close()
        return [step["loss"] for step in history.steps]


TINY = Problem((16, 16, 16, 2))
parity = [needs_concrete_ml, quiet, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


def marked(function: Callable[..., None]) -> Callable[..., None]:
    for mark in parity:
        function = mark(function)
    return function


@marked
@pytest.mark.parametrize(
    ("problem", "any_size"),
    [
        pytest.param(Problem((512, 512, 512), steps=8), False, id="512 wide, Concrete ML as it comes"),
        pytest.param(TINY, True, id="tiny"),
        pytest.param(dataclasses.replace(TINY, bias=True), True, id="tiny with biases"),
    ],
)
def test_the_losses_are_those_of_concrete_ml(problem: Problem, any_size: bool, tmp_path: Path) -> None:
    """The same quantizers on the same values: float32 roundings are all that may differ, and on one machine none do."""
    theirs = problem.theirs(tmp_path, "disable", True, any_size)
    ours = problem.ours("concrete-ml?mode=disable")
    assert ours == pytest.approx(theirs, rel=1e-5)
    # Two ways to compute in float32 would not tell quantized from exact.
    assert theirs != pytest.approx(problem.ours(None), rel=1e-5)


@marked
def test_static_quantization_gives_the_losses_of_concrete_ml(tmp_path: Path) -> None:
    """A layer that reads the data has the same range in both, so its losses are the same."""
    problem = Problem((16, 2))
    theirs = problem.theirs(tmp_path, "disable", False)
    assert problem.ours("concrete-ml?mode=disable&use_dynamic_quantization=0") == pytest.approx(theirs, rel=1e-5)
    assert theirs != pytest.approx(problem.ours(None), rel=1e-5)


@marked
def test_small_layers_follow_concrete_ml(tmp_path: Path) -> None:
    """Concrete ML fixes the ranges of later layers on exact activations, and this backend on quantized ones.

    Its own simulation is no reference: it is compiled for the sums of the calibration batch, and loses larger ones.
    """
    theirs = TINY.theirs(tmp_path, "disable", False)
    ours = TINY.ours("concrete-ml?mode=disable&use_dynamic_quantization=0")
    assert ours == pytest.approx(theirs, rel=0.02)
    assert TINY.ours("concrete-ml?mode=simulate&use_dynamic_quantization=0") == ours


@marked
@pytest.mark.usefixtures("same_keys")
def test_encrypted_losses_follow_concrete_ml(tmp_path: Path) -> None:
    """Under encryption each product has noise of its own, about 20 on sums of tens of thousands."""
    problem = Problem((16, 8, 4), steps=3, batch=2)
    theirs = problem.theirs(tmp_path, "execute", True, any_size=True)
    ours = problem.ours("concrete-ml")
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours == pytest.approx(problem.ours("concrete-ml?mode=disable"), rel=0.02)
    assert ours != problem.ours("concrete-ml?mode=disable")


@needs_concrete_ml
@pytest.mark.skipif(not (ROOT / "examples/circles.py").exists(), reason="examples/circles.py is not here")
@pytest.mark.parametrize("to", ["concrete-ml?mode=disable", "concrete-ml", "concrete-ml+zmq://?weight_bits=8"])
def test_the_tutorial_trains(to: str) -> None:
    steps = ["--steps", "20"] if "disable" in to else ["--steps", "2", "--batch", "2"]
    command = [sys.executable, str(ROOT / "examples/circles.py"), "--to", to, "--json", *steps]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # The loss of two points that are all but certain is 0.01, and rounding weights twice, for the wire, moves it by 6%.
    assert result["losses"] == pytest.approx(result["losses_in_the_clear"], rel=0.05, abs=2e-3)
    assert result["traffic"]["requests"] == int(steps[1]) * 3


# Choosing it, and what is refused.


@pytest.mark.parametrize("mode", ["disable", "simulate"])
def test_only_execute_claims_to_encrypt(mode: str) -> None:
    assert choose("concrete-ml").backend.security.encrypted
    security = choose(f"concrete-ml?mode={mode}").backend.security
    assert not security.encrypted
    assert security.bits is None
    with pytest.raises(SecurityError, match="does not encrypt"):
        choose(f"concrete-ml+zmq://127.0.0.1:1?mode={mode}")


@pytest.mark.parametrize(
    ("options", "message"),
    [("n_bits=9", "n_bits=9 must be from 2 to 8"), ("n_bits=1", "from 2 to 8"), ("mode=remote", "mode")],
)
def test_bad_options_are_named(options: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        choose(f"concrete-ml?{options}")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXECUTOR, None)
    backend = choose("concrete-ml?mode=disable").backend
    with pytest.raises(PluginError, match=r'pip install "ciphertune\[concrete-ml\]"'):
        backend.client(torch.device("cpu"))
    fields = {"mode": "disable", "n_bits": 8, "dynamic": True}
    with pytest.raises(PluginError, match=r'pip install "ciphertune\[concrete-ml\]"'):
        type(backend).worker(fields, {}, torch.device("cpu"))
    with pytest.raises(PluginError, match="concrete-ml"):
        ciphertune.outsource(nn.Sequential(nn.Linear(4, 4)), "concrete-ml?mode=disable")


def test_the_plan_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXECUTOR, None)
    up, down = choose("concrete-ml").backend.traffic(LinearMap("layer", "forward", 2049, 2049, 1.0), 3)
    assert (up, down) == (60504, 60392 + 12 * 2049)


@needs_concrete_ml
@pytest.mark.parametrize(
    "change",
    [{"mode": "torch"}, {"n_bits": 16}, {"n_bits": True}, {"dynamic": 1}, {"mode": None}],
    ids=str,
)
def test_fields_of_other_clients_are_refused(change: dict[str, Any]) -> None:
    backend = choose("concrete-ml?mode=disable").backend
    with pytest.raises(ProtocolError):
        type(backend).worker({"mode": "disable", "n_bits": 8, "dynamic": True, **change}, {}, torch.device("cpu"))


@pytest.fixture
def encrypted_pair(same_keys: None) -> Iterator[Pair]:
    both = Pair.make("concrete-ml", 3, 5)
    yield both
    both.close()


@needs_concrete_ml
def test_keys_that_are_none(encrypted_pair: Pair) -> None:
    fields, key = dict(encrypted_pair.client.open_fields()), encrypted_pair.client.evaluation_key()["compression_key"]
    worker = type(encrypted_pair.backend).worker
    cut = key[:-1].clone()
    for bad in ({}, {"compression_key": cut}, {"compression_key": key[None]}, {"compression_key": key[:0]}):
        with pytest.raises(ProtocolError, match="compression"):
            worker(fields, bad, torch.device("cpu"))


@needs_concrete_ml
@pytest.mark.parametrize("fill", [0, 1, 255])
def test_bytes_that_are_no_ciphertext(encrypted_pair: Pair, fill: int) -> None:
    both = encrypted_pair
    encrypted = both.client.encrypt(torch.randn(2, 5), both.map("forward"))
    junk = torch.full_like(encrypted.buffers["ciphertext"], fill)
    with pytest.raises(ProtocolError):
        both.worker.evaluate(both.prepared, "forward", {"ciphertext": junk})
    reply = both.evaluate("forward", encrypted.buffers)
    for name in ("ciphertext", "scale"):
        bad = {**reply, name: torch.full_like(reply[name], fill if name == "ciphertext" else float("nan"))}
        with pytest.raises(ReplyError):
            both.client.decrypt(bad, encrypted.state, both.map("forward"))


@needs_concrete_ml
def test_every_word_that_the_library_allocates_or_indexes_by_is_checked(encrypted_pair: Pair) -> None:
    """Change each word in turn: it is refused, or it is ciphertext, a seed or padding, and the product is another."""
    both = encrypted_pair
    encrypted = both.client.encrypt(torch.randn(2, 5), both.map("forward"))
    reply = both.evaluate("forward", encrypted.buffers)
    counts = []
    for buffers, accepted in (
        (encrypted.buffers, lambda data: request_tokens(data, 5) is not None),
        (reply, lambda data: is_reply(data, 2, 3)),
    ):
        data = buffers["ciphertext"]
        assert accepted(data)
        free = []
        for word in range(0, len(data), 8):
            changed = data.clone()
            changed[word] ^= 1
            free.append(accepted(changed))
        counts.append(sum(free))
    # 39 · 2048 bits and a seed of 128 for every token; (2048 + 3) · 26 bits and what fills their last word.
    assert counts == [2 * (39 * 2048 // 64 + 2), 2 * 834]


@needs_concrete_ml
def test_a_ciphertext_of_another_width_is_refused(encrypted_pair: Pair) -> None:
    both = encrypted_pair
    wide = dataclasses.replace(both.map("forward"), in_features=3000)
    encrypted = both.client.encrypt(torch.randn(1, 3000), wide)
    with pytest.raises(ProtocolError, match="no ciphertext for 5 features"):
        both.worker.evaluate(both.prepared, "forward", encrypted.buffers)


@needs_concrete_ml
def test_sums_that_would_wrap_around_are_refused(same_keys: None) -> None:
    """Concrete ML returns wrong numbers there."""
    layer = nn.Linear(2100, 1, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    model = ciphertune.outsource(nn.Sequential(layer), "concrete-ml")
    with pytest.raises(WorkerError, match="wrap around at 67108864: use fewer bits"):
        model(torch.ones(1, 2100))
    ciphertune.session_of(model).close()
    model = ciphertune.outsource(nn.Sequential(nn.Linear(2000, 1, bias=False)), "concrete-ml?n_bits=7")
    assert model(torch.ones(1, 2000)).isfinite().all()
    ciphertune.session_of(model).close()


@needs_concrete_ml
@pytest.mark.parametrize("quantization", ["mode=disable", "mode=disable&use_dynamic_quantization=0", "mode=simulate"])
def test_equal_values_are_not_rounded_to_whole_numbers(quantization: str) -> None:
    """Concrete ML's dynamic quantizers take 1 for the step of a token, or a channel, whose values are all equal."""
    layer = nn.Linear(6, 3, bias=False)
    nn.init.constant_(layer.weight, 0.3)
    model = ciphertune.outsource(nn.Sequential(layer), f"concrete-ml?{quantization}")
    y = model(torch.full((2, 6), 0.7))
    ciphertune.session_of(model).close()
    assert float((y - 6 * 0.3 * 0.7).abs().max()) < 0.02


@needs_concrete_ml
def test_fewer_bits_are_coarser() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (4, 6, 8):
        both = Pair.make(f"concrete-ml?mode=disable&n_bits={bits}", 32, 64)
        errors.append(float((both.product("forward", x) - x @ both.matrix("forward").t().float()).std()))
        both.close()
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@needs_concrete_ml
def test_the_halves_hold_nothing_of_each_other(encrypted_pair: Pair) -> None:
    assert encrypted_pair.worker._executor.private_key is None  # type: ignore[attr-defined]
    assert not any(isinstance(value, Tensor) for value in vars(encrypted_pair.client).values())
    encrypted_pair.client.close()
    assert encrypted_pair.client._executor.private_key is None  # type: ignore[attr-defined]


@needs_concrete_ml
@quiet  # type: ignore[untyped-decorator]
@pytest.mark.filterwarnings("ignore")
def test_what_their_trainer_wrote_goes_on_here(tmp_path: Path) -> None:
    """A checkpoint of Concrete ML's own ``LoraTrainer``, not one that imitates it."""
    from concrete.ml.torch.lora import LoraTrainer
    from peft import LoraConfig, get_peft_model

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, labels: Any = None) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    def made() -> Any:
        torch.manual_seed(0)
        return get_peft_model(Network(), LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"]))

    model = made()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batches = [(torch.randn(4, 2), torch.randint(2, (4,))) for _ in range(3)]
    theirs = LoraTrainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        checkpoint_dir=str(tmp_path),
        train_log_path=str(tmp_path / "log"),
        logging_steps=1,
    )
    theirs.compile(batches[0], n_bits=8)
    theirs.train(batches, num_epochs=2, fhe="disable")
    ours = made()
    found = ciphertune.load_concrete_ml(ours, tmp_path)
    assert (found.epoch, found.path.suffix) == (2, ".pth")
    assert found.losses == pytest.approx(theirs.get_training_losses())
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(wanted) == 4
    for name, of_theirs in zip(trained, wanted, strict=True):
        assert torch.equal(trained[name], of_theirs), name
    again = torch.optim.Adam(list(trained.values()), lr=0.01)
    assert found.optimizer is not None
    again.load_state_dict(found.optimizer)
    assert any(name.endswith("lora_B.default.weight") for name in found.gradient_norms)


@needs_concrete_ml
def test_the_guide_names_what_concrete_ml_has() -> None:
    page = (ROOT / "docs" / "from-concrete-ml.md").read_text(encoding="utf-8")
    table = page[page.index("## Name by name") : page.index("## Other differences")]
    left = [line.partition(" | ")[0] for line in table.splitlines() if line.startswith("|")]
    names = {
        name for cell in left for code in re.findall("`([^`]*)`", cell) for name in re.findall(r"[A-Za-z_]\w+", code)
    }
    folder = Path(str(metadata.distribution("concrete-ml").locate_file("concrete/ml")))
    source = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    missing = {name for name in names if re.search(rf"\b{name}\b", source) is None}
    # Methods of peft, and names of variables in the notebooks and on their page.
    assert missing == {"disable_adapter_layers", "enable_adapter_layers", "lora_training", "peft_model"}
