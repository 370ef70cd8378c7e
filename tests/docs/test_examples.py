"""Examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("core", "backends", "transports", "plugins")
MODULES = sorted(
    ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__")
    for folder in SOURCES
    for path in (ROOT / folder).glob("ciphertune*/**/*.py")
    if "-" not in path.relative_to(ROOT / folder).parts[0] and ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str) -> None:
    if name == "ciphertune_ray.deployment":
        pytest.importorskip("ray")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 == found.failed
