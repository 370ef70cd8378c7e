"""Comparisons of several environments in one table."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm
from click.testing import CliRunner

from ciphertune.bench.compare import Product, bench_compare
from ciphertune.bench.merging import merge
from ciphertune.bench.table import markdown
from ciphertune.cli import cli
from ciphertune.errors import ConfigError


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", warm.completed)
        return bench_compare(["clear"], Product(2, 16, 16), repeat=1)


def written(folder: Path, **results: Any) -> list[Path]:
    files = []
    for name, result in results.items():
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(result))
    return files


def test_each_row_says_where_it_was_measured(measured: dict[str, Any], tmp_path: Path) -> None:
    here, there = copy.deepcopy(measured), copy.deepcopy(measured)
    here["rows"] += [{"to": "strange", "reason": "not here"}, {"to": "nowhere", "reason": "nor there"}]
    there["rows"] += [{**there["rows"][0], "to": "strange"}, {"to": "nowhere", "reason": "gone"}]
    there["machine"]["torch"] = "2.3.1"
    files = written(tmp_path, here=here, there=there)
    result = merge(files)
    assert [row["to"] for row in result["rows"]] == [
        "clear [1]", "clear [2]", "nowhere [1]", "nowhere [2]", "strange [2]",
    ]  # fmt: skip
    text = markdown(result)
    assert "torch 2.3.1" in text.split("[2]: ")[1].splitlines()[0]
    assert "| strange [2] | none |" in text
    assert "| nowhere [1] | nor there |" in text
    shown = CliRunner().invoke(cli, ["bench", "merge", *map(str, files)])
    assert shown.exit_code == 0
    assert "[2]: " in shown.output
    assert CliRunner().invoke(cli, ["bench", "merge", "--markdown", *map(str, files)]).output == text
    assert json.loads(CliRunner().invoke(cli, ["bench", "merge", "--json", *map(str, files)]).output) == result


def test_what_cannot_be_merged(measured: dict[str, Any], tmp_path: Path) -> None:
    other = {**measured, "large": "1 × 2 × 3"}
    with pytest.raises(ConfigError, match="compares a product of 1 × 2 × 3, and .* one of 2 × 16 × 16"):
        merge(written(tmp_path, a=measured, b=other))
    for wrong in ([], {}, {**measured, "rows": []}, {**measured, "rows": [{"to": "x"}]}):
        with pytest.raises(ConfigError, match="is not what 'ciphertune bench compare --json' prints"):
            merge(written(tmp_path, a=wrong))
    with pytest.raises(ConfigError, match="cannot read"):
        merge([tmp_path / "absent.json"])
    result = CliRunner().invoke(cli, ["bench", "merge"])
    assert result.exit_code == 2
