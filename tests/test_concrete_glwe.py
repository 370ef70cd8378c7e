"""The concrete-glwe backend: the suite, keys and their file, hostile bytes, its error and the simulation of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciphertune.testing import BackendSuite

pytest.importorskip("concrete_ml_extensions", reason='needs pip install "ciphertune[concrete-glwe]"')


@pytest.fixture(scope="module", autouse=True)
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One key for all tests here, where backends look for it by default."""
    folder = tmp_path_factory.mktemp("keys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CIPHERTUNE_KEYS", str(folder))
        yield folder


class TestGlwe(BackendSuite):
    selection = "concrete-glwe"
    # Time goes by tokens times outputs.
    shapes = ((1, 1, 1), (2, 5, 3), (6, 70, 4))
    training = (8, 8, 6)
