"""Workers in processes of their own on this machine, for benchmarks and examples."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from torch import nn

from ciphertune import registry
from ciphertune.errors import CipherTuneError
from ciphertune.selection import Selection

_START_SECONDS = 120.0


@contextlib.contextmanager
def worker_process(bundle: Path, curve: Path | None, arguments: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """A worker over a bundle's worker folder, on a free port of this machine's loopback address.

    Args:
        bundle: the folder.
        curve: folder with keys; plain TCP if None.
        arguments: more of ``ciphertune worker``.

    Yields:
        Its address and process id, once it takes requests. It is stopped in the end.

    Raises:
        CipherTuneError: it did not start.
    """
    security = ["--insecure"] if curve is None else ["--curve", str(curve)]
    command = [sys.executable, "-m", "ciphertune", "worker", str(bundle), "--bind", "tcp://127.0.0.1:*", *security]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield _ready(process, errors), process.pid
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _base_of(model: str | nn.Module) -> str | nn.Module:
    if model != "mlp":
        return model
    # Its weights come from a short training, always the same.
    from ciphertune.workloads import load_workload

    return load_workload("mlp", batches=1, tokens=1, held_out=1).model


def _ready(process: subprocess.Popen[str], errors: IO[str]) -> str:
    stream = process.stdout
    assert stream is not None
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        readable, _, _ = select.select([stream], [], [], 0.5)
        line = stream.readline() if readable else ""
        if line.startswith("ready "):
            return line.split()[1]
        if process.poll() is not None:
            break
    errors.seek(0)
    last = errors.read().strip().splitlines()[-1:] or ["no output"]
    raise CipherTuneError(f"the worker did not start: {last[0]}")


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
    if selection.transport != "zmq":
        raise CipherTuneError(f"workers can be started for zmq only, so {to!r} needs endpoints")
    from ciphertune.bundle import split

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        split(_base_of(model), Path(folder) / "bundle")
        options = dict(selection.options)
        curve = None
        if "insecure" not in options:
            curve = Path(folder) / "keys"
            transport.make_keys(curve, ("client",), worker=True)
            options["curve"] = str(curve)
        address, _ = stack.enter_context(worker_process(Path(folder) / "bundle" / "worker", curve))
        yield str(Selection(selection.backend, selection.transport, (address,), options))
