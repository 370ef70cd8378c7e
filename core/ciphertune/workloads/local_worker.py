"""A worker in a process of its own, started for a selection string that names none."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ciphertune.plugins import registry
from ciphertune.selection import Selection
from ciphertune.worker.process import worker_process


def _base_of(model: str | nn.Module) -> str | nn.Module:
    if model != "mlp":
        return model
    # Its weights come from a short training, always the same.
    from ciphertune.workloads.named import load_workload

    adapted: Any = load_workload("mlp", batches=1, tokens=1, held_out=1).model
    base: nn.Module = adapted.unload()
    return base


@contextlib.contextmanager
def serving(model: str | nn.Module, to: str) -> Iterator[str]:
    """A selection as a user wrote it, with a worker behind it: one is started if it names none.

    Args:
        model: what to split for it: a built-in workload's name, or a module.
        to: a selection string; with a remote transport and no endpoint, such as ``mlwe+zmq://``, a worker is started
            for as long as this context lasts.

    Yields:
        The selection string to use.
    """
    selection = Selection.parse(to)
    transport = registry.load(registry.TRANSPORTS, selection.transport)
    if not transport.remote or selection.endpoints:
        yield to
        return
    from ciphertune.bundle.writer import split

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        here = transport.loopback(folder, selection.options)
        split(_base_of(model), folder / "bundle")
        process = worker_process(folder / "bundle" / "worker", selection.transport, here.address, here.serve)
        address, _ = stack.enter_context(process)
        options = {**selection.options, **here.connect}
        yield str(Selection(selection.backend, selection.transport, (address,), options))
