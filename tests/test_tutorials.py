"""The tutorials run, their results hold, and their notebooks are what their sources make."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need Jupyter's packages")

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"
BUILD = runpy.run_path(str(TUTORIALS / "build.py"))


def two_moons(found: dict[str, Any]) -> None:
    assert found["moons_original"] == found["moons_adapters_off"] > 0.97
    assert found["circles_original"] < 0.8
    for kind in ("clear", "simulation", "encrypted", "tuned"):
        assert found[f"circles_{kind}"] > 0.9, kind
    assert found["losses_encrypted"] == pytest.approx(found["losses_clear"], abs=0.05)
    assert 0 < found["largest_loss_difference"] < 0.1


def private_text(found: dict[str, Any]) -> None:
    assert found["held_out_before"] == pytest.approx(found["held_out_original"], abs=0.02)
    assert found["held_out_adapters_off"] == pytest.approx(found["held_out_before"], abs=0.02)
    assert found["held_out_after"] < found["held_out_before"] - 1
    assert found["held_out_after"] == pytest.approx(found["held_out_after_clear"], abs=0.25)
    assert found["losses"][-1] < found["losses"][0] - 1
    assert 0 < found["largest_loss_difference"] < 0.5
    assert found["written_after"].startswith("Bed 7:")
    assert found["written_after"] != found["written_before"]


def two_roles(found: dict[str, Any]) -> None:
    assert found["upright_original"] > 0.9
    assert found["mirrored_before"] < 0.6
    assert found["mirrored_before"] == pytest.approx(found["mirrored_original"], abs=0.05)
    assert found["mirrored_after"] == pytest.approx(found["mirrored_after_clear"], abs=0.06)
    assert min(found["mirrored_after"], found["mirrored_tuned"]) > found["mirrored_before"] + 0.2
    assert 0 < found["largest_loss_difference"] < 0.2
    assert found["first_killed"]
    assert found["second_ran_to_the_end"]
    assert found["second_status"] == 0
    assert found["equal_bytes"] < 0.01
    assert found["parameters_here"] == 128 + 128 + 10


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "1-two-moons": two_moons,
    "2-private-text": private_text,
    "3-two-roles": two_roles,
}


def test_every_tutorial_is_checked() -> None:
    assert BUILD["NAMES"] == sorted(CHECKS)
    assert sorted(path.stem for path in TUTORIALS.glob("*.ipynb")) == sorted(CHECKS)


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.filterwarnings("ignore")
def test_a_tutorial_runs_and_its_results_hold(name: str, tmp_path: Path) -> None:
    CHECKS[name](BUILD["run"](BUILD["read"](name), tmp_path))


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_notebook_is_what_its_source_makes(name: str) -> None:
    committed = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    made = BUILD["read"](name)
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in made.cells]
    assert any(cell.get("outputs") for cell in committed.cells), "run docs/tutorials/build.py"
