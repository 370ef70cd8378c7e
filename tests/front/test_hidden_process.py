"""Other processes of the same user cannot read a client's memory."""

import os
import sys

import pytest
import warm

PROBE = """
import ctypes, sys
from {module} import {name}
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
try:
    {call}
except SystemExit:
    pass
print("dumpable", before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), oct(__import__("os").stat("/proc/self/mem").st_uid))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has it")


def dumpable(module: str, name: str, call: str, **environment: str) -> tuple[str, str]:
    code = PROBE.format(module=module, name=name, call=call)
    run = warm.run(code, preload=warm.TORCH, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    _, before, after, _ = run.stdout.splitlines()[-1].split()
    return before, after


def test_commands_hide_their_process() -> None:
    assert dumpable("ciphertune.cli", "main", "main(['transports'])") == ("1", "0")
    assert dumpable("ciphertune.cli", "main", "main(['transports'])", CIPHERTUNE_DUMPABLE="1") == ("1", "1")


def test_a_client_of_a_cluster_is_hidden_from_its_relay() -> None:
    """The relay is started by then, or fails to: whatever runs in it is of the same user."""
    call = """
    class Popen:
        def __init__(self, *_, **__):
            raise SystemExit
    sys.modules["ciphertune_ray.relay_client"].subprocess.Popen = Popen
    _RelayProcess(None, 1 << 20, None, None, None)
    """.strip()
    assert dumpable("ciphertune_ray.relay_client", "_RelayProcess", call) == ("1", "0")
