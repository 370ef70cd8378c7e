"""The comparison of backends: what is measured, what is scaled and marked so, and what cannot run."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from click.testing import CliRunner

from ciphertune.backend import Buffers, LinearMap, Work
from ciphertune.bench import compare
from ciphertune.bench.compare import Product, bench_compare, measure
from ciphertune.bench.table import markdown, tables
from ciphertune.cli import cli
from ciphertune.errors import ConfigError, PluginError, PrecisionError, SelectionError
from ciphertune.plugins import registry

ROOT = Path(__file__).parents[2]
ClearBackend = registry.load(registry.BACKENDS, "clear")
LARGE = Product(16, 128, 96)


class Keyed(ClearBackend):
    """Has a key to send, takes no more than 16 features, and says that it grows with its tokens alone."""

    name = "keyed"

    def client(self, device: torch.device) -> Any:
        half = ClearBackend().client(device)
        half.evaluation_key = lambda: {"key": torch.zeros(1000, dtype=torch.uint8)}
        return half

    def refuse_imprecise(self, linear_map: LinearMap) -> None:
        if linear_map.in_features > 16:
            raise PrecisionError(f"{linear_map.in_features} features are too many")

    def traffic(self, linear_map: LinearMap, tokens: int) -> None:
        return None

    def work(self, linear_map: LinearMap, tokens: int) -> Work:
        return Work(2 * tokens, 3 * tokens, 5 * tokens, "tokens")


class Absent(ClearBackend):
    """Needs what is not there."""

    name = "absent"

    @classmethod
    def worker(cls, fields: Any, evaluation_key: Buffers, device: torch.device) -> Any:
        raise PluginError("the package is missing: pip install it")


class Dead(ClearBackend):
    """Takes its process with it."""

    name = "dead"


@pytest.fixture
def here(register: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends of these tests, measured in this process: a child would not know them."""
    for backend in (Keyed, Absent, Dead):
        register(registry.BACKENDS, backend)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        request = json.loads(command[-1])
        if request["to"] == "dead":
            return subprocess.CompletedProcess(command, -6, "", "panicked\nabort")
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.stdout, "write", lines.append)
            compare._main(command[-1])
        return subprocess.CompletedProcess(command, 0, "".join(lines), "")

    monkeypatch.setattr(subprocess, "run", run)


def test_what_is_measured_is_right() -> None:
    found = measure("clear", Product(3, 8, 5), LARGE, 2, 0)
    assert (found["bytes_up"], found["bytes_down"], found["key_bytes"]) == (3 * 8 * 4, 3 * 5 * 4, 0)
    assert found["relative_rms_error"] < 1e-6
    assert found["rounds"] == 2
    assert all(
        found[f"{name}_s"] > 0 for name in ("plaintext_fp32", "keygen", "open", "encrypt", "evaluate", "decrypt")
    )
    assert found["growth"]["evaluate_s"] == (16 * 128 * 96) / (3 * 8 * 5)
    assert found["growth"]["bytes_up"] == (16 * 128) / (3 * 8)
    rounded = measure("clear?weight_bits=8", Product(3, 64, 50), LARGE, 1, 0)
    assert 1e-3 < rounded["relative_rms_error"] < 2e-2
    assert rounded["relative_rms_error_quantized_weight"] < 1e-6


def test_a_slow_round_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_SLOW_SECONDS", 0.0)
    assert measure("clear", Product(3, 8, 5), LARGE, 50, 0)["rounds"] == 1


@pytest.mark.slow
def test_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", warm.completed)
    result = bench_compare(["clear", "mlwe"], LARGE, repeat=1)
    clear, mlwe = result["rows"]
    assert (clear["to"], mlwe["to"]) == ("clear", "mlwe")
    assert (clear["encrypted"], mlwe["encrypted"]) == (False, True)
    assert mlwe["security_bits"] == 130.2
    for row in (clear, mlwe):
        assert row["small"]["product"] == "4 × 64 × 64"
        assert (row["large"]["product"], row["large"]["scaled"]) == ("16 × 128 × 96", False)
        assert row["large"]["relative_rms_error"] < 0.02
    assert mlwe["large"]["bytes_up"] == 3 * 128 * 16
    assert result["machine"]["cores"] > 0


def test_what_would_take_long_is_scaled_and_marked(here: None) -> None:
    (row,) = bench_compare(["mlwe"], LARGE, repeat=1, seconds=1e-9)["rows"]
    small, large = row["small"], row["large"]
    assert large["scaled"] is True
    assert "relative_rms_error" not in large
    for phase, many, few in (
        ("encrypt", 16 * (128 + 96), 4 * (64 + 64)),
        ("evaluate", 16 * 128 * 96, 4 * 64 * 64),
        ("decrypt", 16 * 96, 4 * 64),
    ):
        assert large[f"{phase}_s"] / small[f"{phase}_s"] == pytest.approx(many / few)
    # Bytes are not scaled where the backend foretells them.
    assert large["bytes_up"] == pytest.approx(3 * 128 * 16)
    text = markdown({"machine": compare.machine(), "large": str(LARGE), "rows": [row]})
    assert "SCALED from 4 × 64 × 64" in text
    assert "| ~" in text
    assert "mlwe was not run at this size; its times are scaled by tokens × inputs" in text


def test_a_backend_that_needs_a_smaller_product(here: None) -> None:
    (row,) = bench_compare(["keyed"], LARGE, repeat=1)["rows"]
    assert row["small"]["product"] == "4 × 16 × 16"
    assert row["small"]["key_bytes"] == 1000
    assert row["large"]["scaled"] is True
    assert row["large"]["evaluate_s"] == pytest.approx(row["small"]["evaluate_s"] * 4)
    assert row["large"]["bytes_up"] == row["small"]["bytes_up"] * (16 * 128) / (4 * 16)
    assert row["limit"] == "4 × 64 × 64: 64 features are too many"
    assert row["limit"] in markdown({"machine": compare.machine(), "large": str(LARGE), "rows": [row]})


def test_backends_that_cannot_run_are_rows_with_the_reason(here: None) -> None:
    rows = {row["to"]: row for row in bench_compare(["absent", "clear", "dead"], LARGE, repeat=1)["rows"]}
    assert rows["absent"]["reason"] == "the package is missing: pip install it"
    assert rows["dead"]["reason"] == "its process ended with status -6: abort"
    assert "small" in rows["clear"]
    shown = list(tables({"machine": compare.machine(), "large": str(LARGE), "rows": list(rows.values())}))
    assert shown[-1][0] == "Cannot run here"
    assert shown[-1][2] == [(name, rows[name]["reason"]) for name in ("absent", "dead")]


def test_a_process_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    (row,) = bench_compare(["clear"], LARGE, repeat=1, seconds=1)["rows"]
    assert row["reason"] == "4 × 64 × 64: not done after 302 s"


@pytest.mark.parametrize("argument", ["tokens", "in_features", "repeat", "seconds"])
def test_sizes_must_be_positive(argument: str) -> None:
    sizes = {"tokens": 2, "in_features": 3, "out_features": 4}
    rest = {"repeat": 1, "seconds": 1.0}
    (sizes if argument in sizes else rest)[argument] = 0
    with pytest.raises(ConfigError, match=argument):
        bench_compare(["clear"], Product(**sizes), **rest)  # type: ignore[arg-type]


def test_a_selection_that_is_none() -> None:
    with pytest.raises(SelectionError, match="did you mean 'mlwe'"):
        bench_compare(["mlew"], LARGE)


def test_the_command(here: None) -> None:
    arguments = ["bench", "compare", "--to", "clear", "--to", "mlwe", "--repeat", "1", "--tokens", "8"]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert [row["to"] for row in found["rows"]] == ["clear", "mlwe"]
    assert found["large"] == "8 × 768 × 768"
    shown = CliRunner(env={"COLUMNS": "240"}).invoke(cli, arguments)
    assert shown.exit_code == 0
    for text in ("130 by", "4 × 64 × 64", "One product of 8 × 768 × 768", "key sent"):
        assert text in shown.output


def test_the_page_has_a_place_for_the_table() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "compare.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    new = script["replaced"](page, "TABLE\n")
    assert new.count("TABLE") == 1
    assert 0 < len(new) < len(page)
    assert "SCALED" in page
