"""What tests of the mlwe backend share: its code in both forms, and stocks of masks that are closed after the test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mask_bench import Bench
from mlwe_halves import portable_code

from ciphertune_mlwe import native


@pytest.fixture(params=["compiled", "portable"])
def code(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "compiled" and native.library() is None:
        pytest.skip("the native library was not built")
    with portable_code() if request.param == "portable" else contextlib.nullcontext():
        yield


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for each in made:
        each.stock.close()
