"""``ciphertune`` and ``python SCRIPT`` for a shell, forked from a process that has imported what they need.

A shell script starts a process for each of its commands, which would import torch and transformers for seconds. Those
that it finds here ask the tests to fork one, and stand for it: they pass signals on and end with its status; it is
killed when they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import warm

_STANDS_FOR_IT = """
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
told = json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()])
socket.send_fds(connection, [told.encode()], [1, 2])
pid = int(connection.recv(64))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(pid, number))
status = int(connection.recv(64))
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
_RUN = """
import runpy, sys
name, *sys.argv = sys.argv[1:]
if name == "python":
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    sys.argv.insert(0, name)
    runpy.run_module("ciphertune", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def forked_commands(folder: Path, preload: Sequence[str] = warm.CLIENT) -> Iterator[str]:
    """A value of ``PATH`` with these commands in front of what there is; real ones where there is no Linux.

    Args:
        folder: a new one, for the commands; its path is short, as those of sockets are.
        preload: what to import for them.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not sys.platform.startswith("linux"):
        yield path
        return
    folder.mkdir()
    address = str(folder / "socket")
    (folder / "stands_for_it.py").write_text(_STANDS_FOR_IT)
    for name in ("ciphertune", "python"):
        script = f'#!/bin/sh\nexec "{sys.executable}" -IS "{folder}/stands_for_it.py" "{address}" {name} "$@"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        accepting = threading.Thread(target=_accept, args=(listener, preload), daemon=True)
        accepting.start()
        try:
            yield f"{folder}{os.pathsep}{path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(60)


def _accept(listener: socket.socket, preload: Sequence[str]) -> None:
    commands = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            break
        commands.append(threading.Thread(target=_stand, args=(connection, preload), daemon=True))
        commands[-1].start()
    for command in commands:
        command.join(60)


def _stand(connection: socket.socket, preload: Sequence[str]) -> None:
    """Fork what a command stands for, and tell it how that ended; end it when the command is gone."""
    with connection:
        told, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        arguments, environment, folder = json.loads(told)
        with os.fdopen(streams[0], "w") as out, os.fdopen(streams[1], "w") as errors:
            process = warm.start(
                arguments, preload, code=_RUN, stdout=out, stderr=errors, env=environment, cwd=Path(folder)
            )
        connection.send(str(process.pid).encode())
        while (status := process.poll()) is None:
            if select.select([connection], [], [], 0.05)[0]:
                process.kill()
                process.wait(60)
                return
        with contextlib.suppress(OSError):
            connection.send(str(status).encode())
