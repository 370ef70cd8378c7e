"""A worker in a process of its own, started for a selection string that names none."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed
from ciphertune.selection import Selection
from ciphertune.worker.process import worker_process
from ciphertune.workloads.base import base_of


@contextlib.contextmanager
def serving(model: str | nn.Module, to: str) -> Iterator[str]:
    """Start a worker for a selection string that names none, for as long as the context lasts.

    Args:
        model: the model that the worker serves: a workload's name, or a module.
        to: a selection string. A worker is started for a remote transport without an endpoint, as ``mlwe+zmq://``.

    Yields:
        The selection string to use, which names the worker.
    """
    with serving_process(model, to) as (served, _):
        yield served


@contextlib.contextmanager
def serving_process(model: str | nn.Module, to: str, arguments: Sequence[str] = ()) -> Iterator[tuple[str, int | None]]:
    """As ``serving``; yields the process id of the worker as well, or None where none was started.

    Args:
        model: that the worker serves.
        to: as of ``serving``.
        arguments: more of ``ciphertune worker``.
    """
    selection = Selection.parse(to)
    transport = registry.load(registry.TRANSPORTS, selection.transport)
    if not transport.remote or selection.endpoints:
        yield to, None
        return
    from ciphertune.bundle.writer import split

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        with blamed(registry.TRANSPORTS, selection.transport, "'loopback'", quote=True):
            here = transport.loopback(folder, selection.options)
        split(base_of(model), folder / "bundle")
        worker = folder / "bundle" / "worker"
        process = worker_process(worker, selection.transport, here.address, here.serve, arguments)
        address, pid = stack.enter_context(process)
        options = {**selection.options, **here.connect}
        yield str(Selection(selection.backend, selection.transport, (address,), options)), pid
