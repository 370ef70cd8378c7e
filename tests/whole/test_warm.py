"""Processes of tests that are forked from one that has imported torch are as real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from shell_commands import forked_commands

_TOLD = """
import os, signal, sys, threading
print(sys.argv, os.environ.get("GIVEN"), os.environ.get("ABSENT"), os.getcwd(), __name__)
print(threading.active_count(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
print(os.getppid(), sys.path[0] in ("", os.getcwd()))
print("told", file=sys.stderr)
sys.exit(3)
"""
_WAITS = """
import time
print("waits", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["linux", "elsewhere"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, and as where nothing is."""
    if request.param == "elsewhere":
        monkeypatch.setattr(sys, "platform", "elsewhere")
    elif not sys.platform.startswith("linux"):
        pytest.skip("processes are forked on Linux alone")


@pytest.mark.usefixtures("started")
def test_what_a_process_is_given_and_gives(tmp_path: Path) -> None:
    environment = {**os.environ, "GIVEN": "é"}
    environment.pop("ABSENT", None)
    done = warm.run(_TOLD, "a b", "--c", env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        f"['-c', 'a b', '--c'] é None {tmp_path} __main__",
        "1 True",
        f"{os.getpid()} True",
    ]
    assert done.stderr == "told\n"
    assert done.returncode == 3


@pytest.mark.usefixtures("started")
def test_it_is_killed_and_waited_for() -> None:
    process = warm.start([], code=_WAITS)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "waits\n"
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        process.kill()
        assert process.wait(60) == -signal.SIGKILL == process.poll()
    process.kill()  # nothing is there any more


@pytest.mark.usefixtures("started")
def test_a_command() -> None:
    process = warm.start(["--version"])
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.read().startswith("ciphertune, version ")
    assert process.wait(60) == 0


_SHELL = """
ciphertune --version
status=0
python script.py a "b c" || status=$?
echo "status $status"
python script.py waits > waiting &
until [ -s waiting ]; do sleep 0.05; done
kill -9 $!
"""
_SCRIPT = """
import os, sys, time
print(os.getpid(), sys.argv[1:], flush=True)
if sys.argv[1] == "waits":
    time.sleep(600)
sys.exit(3)
"""


def test_commands_of_a_shell(tmp_path: Path) -> None:
    """Their arguments, output and status are those of real ones, and what a command stands for ends with it."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    with forked_commands(tmp_path / "bin", warm.WORKER) as path:
        environment = {**os.environ, "PATH": path}
        run: Any = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": True}
        version, told, status = subprocess.run(["sh", "-euc", _SHELL], **run).stdout.splitlines()
    assert version.startswith("ciphertune, version ")
    assert told.partition(" ")[2] == "['a', 'b c']"
    assert status == "status 3"
    pid = (tmp_path / "waiting").read_text().partition(" ")[0]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
