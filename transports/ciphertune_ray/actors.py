"""The actor with a worker that runs in the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ciphertune.errors import ConfigError
from ciphertune.protocol import Frame


def to_ray(frames: Sequence[Frame]) -> list[Any]:
    """Convert frames to values that Ray carries; arrays go through its object store without another copy."""
    return [frame if isinstance(frame, bytes) else np.frombuffer(frame, dtype=np.uint8) for frame in frames]


def from_ray(values: Sequence[Any]) -> list[Frame]:
    """Convert Ray's values back to frames. What is neither bytes nor an array of them is left out."""
    return [
        value if isinstance(value, bytes) else value.data
        for value in values
        if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1)
    ]


class WorkerActor:
    """A worker with some layers of a bundle. After it has died Ray starts it again, without its sessions.

    Args:
        spec: a ``Spec`` as plain data.
        index: its number in the deployment.
    """

    def __init__(self, spec: dict[str, Any], index: int) -> None:
        import torch

        from ciphertune.bundle.worker import load_worker
        from ciphertune.plugins import registry
        from ciphertune.worker import Quota, Service, SessionLimits, Worker
        from ciphertune_ray.bundles import fetch_and_load

        torch.set_num_threads(spec["threads"] or max(1, int(spec["cpus"])))
        device = "cuda" if spec["gpus"] else "cpu"
        part, layers, rows = spec["parts"][index % len(spec["parts"])]
        self._spec, self._index = spec, index
        store = fetch_and_load(
            part,
            layers,
            lambda folder: load_worker(folder, device=device, layers=layers or None, rows=tuple(rows)),
        )
        self._service = Service(
            Worker(
                store,
                device,
                SessionLimits(idle_seconds=spec["idle_seconds"]),
                backends=spec.get("backends") or None,
            ),
            Quota(spec["max_requests"], spec["max_client_mb"] << 20),
        )

        self._listener = None
        if spec["listen"]:
            transport = registry.load(registry.TRANSPORTS, spec["listen"])
            address = f"0.0.0.0:{spec['port'] + index if spec['port'] else '*'}"
            self._listener = transport.listen(self._service, address, spec["listen_options"])
            if spec.get("addresses"):
                write_address(Path(spec["addresses"]) / f"{index}.address", self._address())

    async def answer(self, peer: str, *frames: Any) -> list[Any]:
        """Answer a request of the client known as ``peer``."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[tuple[list[Frame], Callable[[], None]]] = loop.create_future()

        def reply(out: list[Frame], release: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(_set_result, answered, (out, release))

        self._service.submit(from_ray(frames), peer, reply)
        out, release = await answered
        # Ray copies the frames into its object store when this returns.
        release()
        return to_ray(out)

    async def describe(self) -> dict[str, Any]:
        """Describe where it runs and which layers it holds, as plain data."""
        import ray

        worker, load = self._service.worker, self._service.load
        return {
            "index": self._index,
            "host": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "device": str(worker.device),
            "part": self._index % len(self._spec["parts"]),
            "layers": len(worker.weights),
            "weight_bytes": worker.weights.nbytes,
            "sessions": worker.sessions,
            "queued": load.queued,
            "under_way": load.under_way,
            "address": self._address(),
            "spec": self._spec,
        }

    def _address(self) -> str:
        """Its address for clients outside the cluster; empty if it does not listen."""
        import ray

        if self._listener is None:
            return ""
        return f"{ray.util.get_node_ip_address()}:{self._listener.address.rpartition(':')[2]}"


def write_address(file: Path, address: str) -> None:
    """Write where clients find a worker, such that nobody reads half of it. Raises ``ConfigError``."""
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(f"{address}\n", encoding="ascii")
        draft.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ConfigError(f"the worker's address cannot be written to {file}: {error.strerror}") from error


def _set_result(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
