"""The ray transport is a transport: a worker started by hand, behind an actor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ciphertune.testing import TransportSuite

pytest.importorskip("ray", reason="the ray transport needs Ray")

from cluster import cluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with cluster():
        yield


class TestRay(TransportSuite):
    name = "ray"
