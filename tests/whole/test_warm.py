"""Processes of tests that are forked from one that has imported torch are as real ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import warm

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
