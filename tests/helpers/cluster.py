"""A Ray cluster of several nodes on this machine, small ones."""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

MEMORY = 2 << 30
"""Bytes that each node claims to have for actors."""

SERVER = {
    # The server of Ray Client forks for each client; gRPC's handlers of forks can kill the child before it is a server.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",
    # A worker for each processor of each node, which actors with an environment of their own do not use.
    "RAY_prestart_worker_first_driver": "0",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def cluster(nodes: int = 1, cpus: int = 4, client_port: int | None = None) -> Iterator[Any]:
    """A cluster, which ``RAY_ADDRESS`` names meanwhile; this process is no part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster
    size = {"num_cpus": cpus, "memory": MEMORY, "object_store_memory": 256 << 20}
    head = {**size, "include_dashboard": False, "ray_client_server_port": client_port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVER.items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            for _ in range(nodes - 1):
                made.add_node(**size)
            yield made
        finally:
            made.shutdown()
