"""Which of Zama's packages each backend was made for: said by lists and at first use, in a sentence."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ciphertune
from ciphertune.backend import LinearMap
from ciphertune.cli import cli
from ciphertune.client.choice import choose
from ciphertune.errors import PluginError
from ciphertune.plugins import registry

CPU = torch.device("cpu")
MADE_FOR = {
    "concrete-circuit": ("concrete-python", "2.11", "2.10.0"),
    "concrete-glwe": ("concrete-ml-extensions", "0.2", "0.1.9"),
    "concrete-ml": ("concrete-ml", "1.9", "1.10.0"),
}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions of packages that are said to be installed; None for one that is not."""
    real, said = importlib.metadata.version, dict[str, str | None]()

    def version(name: str) -> str:
        found = said.get(name, "") if name in said else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    from ciphertune_concrete.circuit import library

    library.version.cache_clear()
    return said


@pytest.mark.parametrize("name", MADE_FOR)
def test_another_version_is_named_before_it_is_used(name: str, versions: dict[str, str | None]) -> None:
    package, series, other = MADE_FOR[name]
    versions[package] = other
    sentence = rf"{name} backend was made for {package} {series}, and {other} is installed here: pip install"
    with pytest.raises(PluginError, match=sentence):
        ciphertune.outsource(nn.Sequential(nn.Linear(600, 600)), name, layers="all")
    versions[package] = None
    assert f"needs {package} {series}, which is not installed here" in str(type(choose(name).backend).problem())
    versions[package] = f"{series}.0"
    assert type(choose(name).backend).problem() is None


def test_lists_name_problems_and_licences(versions: dict[str, str | None]) -> None:
    versions.update({package: other for package, _, other in MADE_FOR.values()})
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(cli, ["backends", "--json"]).stdout)}
    doctor = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["backends"]
    for name, (_, _, other) in MADE_FOR.items():
        assert f"and {other} is installed here" in rows[name]["problem"]
        assert f"and {other} is installed here" in doctor[name]["cannot run here"]
        assert "patent licence from Zama" in rows[name]["licence"]
        assert "patent licence from Zama" in doctor[name]["licence"]
    assert rows["mlwe"]["problem"] is None
    assert "cannot run here: the concrete-ml backend was made" in " ".join(
        CliRunner().invoke(cli, ["backends"]).output.split()
    )


def test_concrete_ml_sends_small_layers_elsewhere() -> None:
    backend = choose("concrete-ml").backend
    for features, advised in (((16, 16), True), ((512, 511), True), ((512, 2048), False)):
        advice = backend.advise(LinearMap("layer", "forward", *features, 1.0))
        assert ("concrete-circuit does" in str(advice)) == advised
    assert choose("concrete-ml?mode=disable").backend.advise(LinearMap("layer", "forward", 16, 16, 1.0)) is None


def test_a_session_says_what_the_backend_advises(register: Any, caplog: pytest.LogCaptureFixture) -> None:
    clear: Any = registry.load(registry.BACKENDS, "clear")

    class Advising(clear):  # type: ignore[misc]
        name: ClassVar[str] = "advising"

        def advise(self, linear_map: LinearMap) -> str | None:
            return "take another" if linear_map.in_features < 8 else None

    register(registry.BACKENDS, Advising)
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 5))
    with caplog.at_level(logging.WARNING, "ciphertune"):
        ciphertune.outsource(model, "advising", layers="all")
    (told,) = [record.getMessage() for record in caplog.records if "take another" in record.getMessage()]
    assert told.startswith("advising: take another (0 (forward) and 1 more)")
