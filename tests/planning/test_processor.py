"""Seconds of the processors that another process has had."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ciphertune._support.processor import processor_seconds


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_seconds_of_a_process_are_those_of_all_its_threads() -> None:
    before, own = time.process_time(), processor_seconds(os.getpid())
    assert own is not None
    assert before <= own <= time.process_time()
    child = subprocess.Popen(["sleep", "60"])
    try:
        found = processor_seconds(child.pid)
    finally:
        child.kill()
        child.wait()
    assert found is not None
    assert 0 <= found < 10
    assert processor_seconds(child.pid) is None
