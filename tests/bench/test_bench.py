"""The benchmarks' measurements."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ciphertune.bench import train as bench
from ciphertune.errors import ConfigError

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
        set_up = {} if request["to"] is None else {"set_up": {"weights": 8, "bytes_down": 0, "seconds": 0.5}}
        figures = {"seconds": [100.0, 4.0, 5.0, 90.0], "losses": [1.0] * 4, "peak_rss_mb": 10.0, "traffic": steps}
        return {**figures, **set_up}

    monkeypatch.setattr(bench, "_child", child)
    result = bench.bench_train("mlp", "clear", 8, 4)
    assert result["encrypted_step_s"] == 5.0
    assert result["encrypt_s"] == result["evaluate_s"] == result["decrypt_s"] == 2.0
    assert (result["requests"], result["bytes_up"], result["bytes_down"]) == (5, 7, 9)
    assert result["set_up"] == {"weights": 8, "bytes_down": 0, "seconds": 0.5}
    assert len(caches) == 1
    assert not Path(caches.pop()).exists(), "what is prepared for the benchmark is kept for it alone"
