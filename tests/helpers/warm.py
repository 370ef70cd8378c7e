"""Processes that need not import torch again: forked from one that has.

A process that imports torch, or transformers, computes for seconds before it does anything. ``start`` has a process
without threads import them once, and fork for each command, which then gets its own arguments, environment, folder and
streams. The new process is a child of this one, as any other. Tests of whether torch is imported, and of what happens
until a command runs, start a real one; so does ``start`` where there is no Linux.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

TORCH = ("torch",)
"""What nearly all import: nothing of this project, nor of its plugins, is loaded yet."""
WORKER = ("ciphertune.cli.worker", "ciphertune.runs.worker", "ciphertune_mlwe", "ciphertune_zmq")
"""What a worker imports."""
CLIENT = (*WORKER, "matplotlib.pyplot", "peft", "transformers.models.llama.modeling_llama")
"""What a process with a model imports."""

_PR_SET_CHILD_SUBREAPER = 36
_START_SECONDS = 180.0
_run = subprocess.run


class Process:
    """What ``subprocess.Popen`` offers of a child process, in as far as tests use it.

    Attributes:
        pid: its number.
        returncode: None until it was waited for; as of ``Popen``.
        stdout: what it prints.
    """

    def __init__(self, pid: int, command: Sequence[str], stdout: IO[str] | None) -> None:
        self.pid, self.stdout, self.args = pid, stdout, list(command)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[str],
    preload: Sequence[str] = WORKER,
    *,
    code: str | None = None,
    stdout: IO[str] | None = None,
    stderr: IO[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Process | subprocess.Popen[str]:
    """``ciphertune ARGUMENTS``, or ``python -c CODE ARGUMENTS``; standard output is a pipe of text if none is given."""
    env = dict(os.environ if env is None else env)
    if not sys.platform.startswith("linux"):
        command = [sys.executable, *(["-m", "ciphertune"] if code is None else ["-c", code]), *arguments]
        out = subprocess.PIPE if stdout is None else stdout
        return subprocess.Popen(command, stdout=out, stderr=stderr, text=True, env=env, cwd=cwd)
    told = {"arguments": list(arguments), "preload": list(preload), "code": code, "env": env}
    request = json.dumps({**told, "cwd": str(cwd or Path.cwd())}).encode()
    server = _server(more=tuple(preload) != TORCH)
    errors = 2 if stderr is None else stderr.fileno()
    if stdout is not None:
        return Process(server.fork(request, stdout.fileno(), errors), arguments, None)
    reader, writer = os.pipe()
    try:
        pid = server.fork(request, writer, errors)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return Process(pid, arguments, open(reader, encoding="utf-8"))  # noqa: PTH123


_MODULE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def popen(
    command: Sequence[str],
    preload: Sequence[str] = WORKER,
    *,
    stderr: IO[str] | None = None,
    env: Mapping[str, str] | None = None,
    **same: Any,
) -> Process | subprocess.Popen[str]:
    """``subprocess.Popen`` of ``python -m MODULE``, with standard output as a pipe of text as it must be asked for."""
    assert list(command[:2]) == [sys.executable, "-m"], command
    assert same == {"stdout": subprocess.PIPE, "text": True}, same
    return start(command[2:], preload, code=_MODULE, stderr=stderr, env=env)


def completed(command: Any, **asked: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run``, which forks what is ``python -m MODULE``: that must ask for text and check nothing."""
    if list(command[:2]) != [sys.executable, "-m"]:
        done: subprocess.CompletedProcess[str] = _run(command, **asked)
        return done
    env, seconds = asked.pop("env", None), asked.pop("timeout", 300.0)
    assert asked == {"capture_output": True, "text": True, "check": False}, asked
    return run(_MODULE, *command[2:], seconds=seconds, env=env)


def run(
    code: str,
    *arguments: str,
    preload: Sequence[str] = WORKER,
    seconds: float = 300.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """``python -c CODE ARGUMENTS`` until it ends: its status, and what it printed."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start(arguments, preload, code=code, stderr=errors, env=env, cwd=cwd)
        assert process.stdout is not None
        with process.stdout:
            printed = process.stdout.read()
        status = process.wait(seconds)
        errors.seek(0)
        return subprocess.CompletedProcess(["python", "-c", code, *arguments], status, printed, errors.read())


_SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(
    path: Path, *arguments: str, preload: Sequence[str] = WORKER, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python PATH ARGUMENTS`` until it ends."""
    return run(_SCRIPT, str(path), *arguments, preload=preload, seconds=600, env=env)


_forking = threading.RLock()


class _Server:
    """A process that forks; forked itself from another one, if one is given."""

    def __init__(self, other: _Server | None) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_START_SECONDS)
        self._process: Process | subprocess.Popen[bytes]
        with theirs:
            if other is not None:
                told = json.dumps({"preload": TORCH, "serve": True})
                self._process = Process(other.fork(told.encode(), theirs.fileno(), 2), [__file__], None)
            else:
                # For libraries that read it when they are loaded: one thread, as all tests have, and no hub.
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        atexit.register(self.close)

    def fork(self, told: bytes, stdout: int, stderr: int) -> int:
        # The new process's parent ends at once; its next living ancestor that asks for orphans becomes the parent.
        with _forking:
            _adopt(True)
            try:
                socket.send_fds(self._socket, [told], [stdout, stderr])
                answer = self._socket.recv(1024)
            finally:
                _adopt(False)
        assert answer, "the process that forks has ended"
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


def _adopt(asked: bool) -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(asked), 0, 0, 0) == 0


@functools.cache
def _started(*, more: bool) -> _Server:
    return _Server(_started(more=False) if more else None)


def _server(*, more: bool) -> _Server:
    """The process that has imported torch alone, or the one with all else that was asked for."""
    with _forking:
        return _started(more=more)


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; in a new process, which is as was asked for but for the command, the request."""
    while True:
        told, received, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not told:
            return None
        request: dict[str, Any] = json.loads(told)
        if not sys.modules.keys() >= set(request["preload"]):
            for name in request["preload"]:
                importlib.import_module(name)
            gc.collect()
            gc.freeze()
        threads = os.listdir("/proc/self/task")  # noqa: PTH208
        assert len(threads) == 1, f"a process that forks has no threads: {threads}"
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if (pid := os.fork()) != 0:
                os.write(writer, str(pid).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            connection.close()
            if request.get("serve"):
                os.close(reader)
                os.close(writer)
                connection = socket.socket(fileno=received[0])
                os.dup2(received[1], 2)
                os.close(received[1])
                continue
            os.dup2(received[0], 1)
            os.dup2(received[1], 2)
            for each in (*received, reader, writer):
                os.close(each)
            # The streams that were there know the files that they were made for.
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
            os.environ.clear()
            os.environ.update(request["env"])
            os.chdir(request["cwd"])
            found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
            sys.path[:1] = [request["cwd"], *found]
            return request
        os.waitpid(between, 0)
        connection.send(os.read(reader, 1024))
        for each in (*received, reader, writer):
            os.close(each)


def _main() -> None:
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return
    if request["code"] is None:
        sys.argv = ["ciphertune", *request["arguments"]]
        runpy.run_module("ciphertune", run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *request["arguments"]]
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _main()
