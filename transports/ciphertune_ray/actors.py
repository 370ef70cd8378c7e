"""What runs in the cluster: an actor with a worker."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ciphertune.protocol import Frame


def carried(frames: Sequence[Frame]) -> list[Any]:
    """Frames in the form in which Ray carries them: arrays go through the object store without being copied again."""
    return [frame if isinstance(frame, bytes) else np.frombuffer(frame, dtype=np.uint8) for frame in frames]


def frames_of(values: Sequence[Any]) -> list[Frame]:
    """The other way. What is neither bytes nor an array of them is left out, and then missed."""
    return [
        value if isinstance(value, bytes) else value.data
        for value in values
        if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1)
    ]


class WorkerActor:
    """A worker over some layers of a bundle. Ray starts it again where it died, without its sessions.

    Args:
        spec: a ``Spec`` as plain data.
        index: its number in the deployment.
    """

    def __init__(self, spec: dict[str, Any], index: int) -> None:
        import torch

        from ciphertune.bundle.worker import load_worker
        from ciphertune.plugins import registry
        from ciphertune.worker import Quota, Service, SessionLimits, Worker
        from ciphertune_ray.bundles import fetched

        torch.set_num_threads(spec["threads"] or max(1, int(spec["cpus"])))
        device = "cuda" if spec["gpus"] else "cpu"
        part, layers = spec["parts"][index % len(spec["parts"])]
        self._spec, self._index = spec, index
        store = fetched(part, layers, lambda folder: load_worker(folder, device=device, layers=layers or None))
        self._service = Service(
            Worker(store, device, SessionLimits(idle_seconds=spec["idle_seconds"])),
            Quota(spec["max_requests"], spec["max_client_mb"] << 20),
        )

        self._listener = None
        if spec["listen"]:
            transport = registry.load(registry.TRANSPORTS, spec["listen"])
            address = f"0.0.0.0:{spec['port'] + index}"
            self._listener = transport.listen(self._service, address, spec["listen_options"])

    async def answer(self, peer: str, *frames: Any) -> list[Any]:
        """Answer a request of the client known as ``peer``."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[tuple[list[Frame], Callable[[], None]]] = loop.create_future()

        def reply(out: list[Frame], release: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(_settle, answered, (out, release))

        self._service.submit(frames_of(frames), peer, reply)
        out, release = await answered
        # Ray copies them into the object store when this returns.
        release()
        return carried(out)

    async def describe(self) -> dict[str, Any]:
        """Where it is and what it holds, as plain data."""
        import ray

        worker = self._service.worker
        return {
            "index": self._index,
            "host": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "device": str(worker.device),
            "shard": self._index % len(self._spec["parts"]),
            "layers": len(worker.weights),
            "weight_bytes": worker.weights.nbytes,
            "sessions": worker.sessions,
            "address": self._address(),
            "spec": self._spec,
        }

    def _address(self) -> str:
        """Where clients that are no part of the cluster find it."""
        import ray

        port = self._spec["port"] + self._index
        return f"{ray.util.get_node_ip_address()}:{port}" if self._listener is not None else ""


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
