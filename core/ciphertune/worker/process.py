"""Workers in processes of their own on this machine, for the demo and benchmarks."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from ciphertune.errors import CipherTuneError

_START_SECONDS = 120.0


@contextlib.contextmanager
def worker_process(
    bundle: Path, transport: str, address: str, options: Mapping[str, str], arguments: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """Run ``ciphertune worker`` over a bundle's worker folder, in a process of its own.

    Args:
        bundle: the folder.
        transport: name of the transport it is served over.
        address: what it binds.
        options: of the transport.
        arguments: more of ``ciphertune worker``.

    Yields:
        Its address and process id, once it takes requests. It is stopped in the end.

    Raises:
        CipherTuneError: it did not start.
    """
    command = [sys.executable, "-m", "ciphertune", "worker", str(bundle), "--transport", transport, "--bind", address]
    # Its only client is this process.
    command += ["--backends", "all"]
    for name, value in options.items():
        command += ["--option", f"{name}={value}"]
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
