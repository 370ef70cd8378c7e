"""Real worker processes, links that misbehave, and a small model to train through them; for several test modules."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import warm

START_SECONDS = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclasses.dataclass
class WorkerProcess:
    """``ciphertune worker`` on this machine."""

    process: warm.Process | subprocess.Popen[str]
    address: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(60)

    def freeze(self) -> None:
        """As a machine that hangs: connections stay, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)
        # The signal is on its way: on a busy machine the worker may answer once more.
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(120)


@contextlib.contextmanager
def worker(folder: Path, *arguments: str, port: int | None = None) -> Iterator[WorkerProcess]:
    """Started, ready, and gone at the end whatever happens."""
    bind = ["--threads", "1", "--log-level", "warning", "--bind", f"tcp://127.0.0.1:{port or '*'}"]
    with _running(["worker", str(folder), *bind, *(arguments or ("--insecure",))]) as running:
        yield running


@contextlib.contextmanager
def worker_of(file: Path) -> Iterator[WorkerProcess]:
    """As ``worker``, of a configuration file with one address."""
    with _running(["worker", "--config", str(file)]) as running:
        yield running


@contextlib.contextmanager
def _running(arguments: list[str]) -> Iterator[WorkerProcess]:
    process = warm.start(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if readable else ""
        assert line.startswith("ready "), f"the worker said {line!r}"
        yield WorkerProcess(process, line.split()[1])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


class Proxy:
    """A TCP link to a worker that can be cut, stalled and slowed.

    Args:
        target: ``HOST:PORT``.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._broken: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._running = threading.Event()
        self._running.set()
        self._closed = False
        self.refuse = False
        self.delays: Iterator[float] | None = None
        self._start(self._accept)

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            self._broken.append(connection)

    def stall(self) -> None:
        """Pass nothing on, in either direction, and break nothing: a half-open link."""
        self._running.clear()

    def flow(self) -> None:
        self._running.set()

    def close(self) -> None:
        self._closed = True
        self._running.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(60)
        for ended in (self._server, *self._broken):
            ended.close()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
                if self.refuse:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
            except OSError:
                continue
            self._connections += [near, far]
            for source, sink in ((near, far), (far, near)):
                self._start(self._pump, source, sink)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._running.wait()
                if self.delays is not None:
                    time.sleep(next(self.delays))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    link = Proxy(target)
    try:
        yield link
    finally:
        link.close()


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """For the tiny language models of ``conftest.tiny``."""
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(48, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def with_adapter(model: Any) -> Any:
    """The same fresh adapters at every call, on the attention's and the feed-forward's inputs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "gate_proj"]))
