"""The benchmarks' measurements."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

import ciphertune
from ciphertune.bench import train as bench
from ciphertune.bench.child import steps
from ciphertune.bench.kernel import bench_kernel
from ciphertune.bench.plaintext import has_bfloat16
from ciphertune.errors import ConfigError
from ciphertune.models.known import BUILT_IN
from ciphertune.workloads.local_worker import serving
from ciphertune.workloads.named import load_workload
from ciphertune_mlwe.kernels import KERNELS

_CHILD = "import json; from ciphertune.bench.child import _peak_mb; print(json.dumps(_peak_mb()))"


def _peak_below(parent_megabytes: int) -> tuple[float, float]:
    """Peak of a child that only imports, started by a process that has touched this much; then the parent's own."""
    probe = (
        "import json, resource, subprocess, sys\n"
        f"held = b'x' * ({parent_megabytes} * 1000 * 1000)\n"
        f"run = subprocess.run([sys.executable, '-c', {_CHILD!r}], capture_output=True, text=True, check=True)\n"
        "print(json.dumps([json.loads(run.stdout), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6]))\n"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    child, parent = json.loads(run.stdout)
    return child, parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux carries the peak over")
def test_a_child_does_not_report_the_peak_of_the_process_that_started_it() -> None:
    child, parent = _peak_below(1500)
    assert parent > 1500
    assert 20 < child < 1000


@pytest.mark.parametrize("argument", ["tokens", "repeat"])
def test_sizes_must_be_positive(argument: str) -> None:
    arguments: dict[str, Any] = {"tokens": 8, "steps": 2, "repeat": 1, argument: 0}
    with pytest.raises(ConfigError, match=f"{argument} must be 1 or more"):
        bench.bench_train("mlp", "clear", **arguments)


def test_phases_are_medians_over_the_steps_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def traffic(seconds: float) -> dict[str, float]:
        phases = dict.fromkeys(("encrypt_seconds", "evaluate_seconds", "decrypt_seconds"), seconds)
        return {**phases, "requests": 5, "bytes_up": 7, "bytes_down": 9}

    caches = set()

    def child(request: dict[str, Any], cache: str) -> dict[str, Any]:
        caches.add(cache)
        steps = [] if request["to"] is None else [traffic(s) for s in (100.0, 1.0, 2.0, 60.0)]
        costs = {"set_up": {"weights": 8, "bytes_down": 0, "seconds": 0.5}, "kernel": "abacus"}
        seconds = [100.0, 3.0, 3.0, 3.0] if "bfloat16" in request else [100.0, 4.0, 5.0, 90.0]
        figures = {"seconds": seconds, "losses": [1.0] * 4, "peak_rss_mb": 10.0, "traffic": steps}
        return figures if request["to"] is None else {**figures, **costs}

    monkeypatch.setattr(bench, "run_child", child)
    monkeypatch.setattr(bench, "has_bfloat16", lambda: True)
    result = bench.bench_train("mlp", "clear", 8, 4)
    assert result["plaintext_bf16_step_s"] == 3.0
    assert result["kernel"] == "abacus"
    assert result["encrypted_step_s"] == 5.0
    assert result["encrypt_s"] == result["evaluate_s"] == result["decrypt_s"] == 2.0
    assert (result["requests"], result["bytes_up"], result["bytes_down"]) == (5, 7, 9)
    assert result["set_up"] == {"weights": 8, "bytes_down": 0, "seconds": 0.5}
    assert len(caches) == 1
    assert not Path(caches.pop()).exists(), "what is prepared for the benchmark is kept for it alone"


def test_bfloat16_is_measured_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr("ciphertune.bench.kernel.has_bfloat16", lambda has=has: has)
        found = bench_kernel("clear", 4, 8, 8, repeat=1)
        assert (found["plaintext_bf16_s"] is not None) == has
    assert found["kernel"] is None


def test_training_in_bfloat16_is_measured_of_inputs_that_are_no_tokens() -> None:
    whole, half = (steps("mlp", None, 32, 3, 0, bfloat16=bfloat16)["losses"] for bfloat16 in (False, True))
    assert half == pytest.approx(whole, rel=0.05)
    assert half != whole


@pytest.mark.parametrize(
    ("told", "has"),
    [("flags\t: fpu avx2 amx_bf16 amx_int8", True), ("Features : fp asimd bf16", True), ("model name : bf16", False)],
)
def test_what_the_processor_tells_of_bfloat16(told: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **options: told)
    assert has_bfloat16() == has


def test_a_product_under_mlwe_names_its_kernel() -> None:
    assert bench_kernel("mlwe?hint_disk=0", 4, 8, 8, repeat=1)["kernel"] in KERNELS


def test_a_folder_with_a_model_is_trained_on_random_tokens(tiny: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}))).save_pretrained(tmp_path / "model")
    plain = steps(str(tmp_path / "model"), None, tokens=16, count=2, seed=1)
    half = steps(str(tmp_path / "model"), None, tokens=16, count=2, seed=1, bfloat16=True)
    own = steps(str(tmp_path / "model"), "clear", tokens=16, count=2, seed=1)
    assert own["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert half["losses"] == pytest.approx(plain["losses"], rel=0.05)
    assert half["losses"] != plain["losses"]


def test_a_known_shape_gets_the_same_random_weights_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**BUILT_IN["smollm2"], "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 1}
    monkeypatch.setitem(BUILT_IN, "small", {**small, "vocab_size": 64})
    work = load_workload("small", batches=2, tokens=512, held_out=1)
    assert [batch["input_ids"].shape for batch in (*work.train, *work.held_out)] == [(2, 256)] * 3
    again: Any = load_workload("small", batches=2, tokens=512, held_out=1).model
    for one, other in zip(work.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with serving("small", "mlwe+zmq://") as to:
        model = ciphertune.outsource(again, to)
        ciphertune.session_of(model).close()


def test_a_model_that_is_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'llama-3-8' is neither a folder nor a known.* did you mean 'llama-3-8b'"):
        load_workload("llama-3-8", batches=1, tokens=16, held_out=1)
    with pytest.raises(ConfigError, match="tokens must be below 256 or a multiple of it, not 300"):
        load_workload("llama-3-8b", batches=1, tokens=300, held_out=1)
