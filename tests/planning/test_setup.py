"""What a plan says of the work before the first step."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch import nn

import ciphertune
from ciphertune.backend import LinearMap
from ciphertune.cli import cli
from ciphertune.client.choice import choose
from ciphertune.planning.measure import measure_preparing
from ciphertune.planning.plan import make_plan


@pytest.mark.parametrize("options", ["", "?weight_bits=16", "?request_bits=32"])
def test_what_is_prepared_is_what_was_planned(tiny: Callable[[str], nn.Module], tmp_path: Path, options: str) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    found = make_plan(str(tmp_path / "model"), f"mlwe{options}", tokens=8, measure=False)
    outsourced = ciphertune.outsource(model, f"mlwe{options}")
    session = ciphertune.session_of(outsourced)
    prepared = session._keys.client._prepared.values()  # type: ignore[attr-defined]
    # Packs of eight rows may have some that are empty.
    held = sum(each.hints.nbytes // (-(-each.rows // 8) * 8) * each.rows for each in prepared)
    assert (found.prepared_codes, found.prepared_bytes) == (found.outsourced, held)
    session.close()


def test_a_backend_that_prepares_nothing(tiny: Callable[[str], nn.Module], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    found = make_plan(str(tmp_path / "model"), "clear", tokens=8, measure=False)
    assert (found.prepared_codes, found.prepared_bytes) == (0, 0)


def test_the_command_says_it() -> None:
    done = CliRunner().invoke(cli, ["plan", "smollm2", "--no-measure"], catch_exceptions=False)
    told = " ".join(done.stdout.replace("\u2502", " ").split())
    assert "before the first step the client reads 106.2 million weights, and keeps 973.2 MB" in told


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pieces_are_as_wide_as_the_product_that_they_are_cut_from(direction: str) -> None:
    backend = choose("mlwe").backend
    wide = LinearMap("layer", direction, 16384, 64, 36 * 128.0)  # type: ignore[arg-type]
    narrow = LinearMap("layer", direction, 256, 64, 36 * 16.0, rows=((0, 256),))  # type: ignore[arg-type]
    assert backend.piece_traffic(wide, narrow, 10) == (4 * 256 * 10, 4 * 64 * 10)
    assert backend.traffic(narrow, 10) == (3 * 256 * 10, 3 * 64 * 10)


def test_measuring_what_preparing_takes_leaves_nothing_on_disk(empty_cache: Path) -> None:
    seconds = [measure_preparing("mlwe") for _ in range(2)]
    assert not empty_cache.exists() or not list(empty_cache.rglob("*.*"))
    # Each time a whole layer is prepared: what an earlier plan kept would count as no weight at all.
    assert all(0 < each < 1e-3 for each in seconds)
