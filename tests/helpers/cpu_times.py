"""A plugin of pytest that measures the CPU time of every test, which other load on the machine changes little.

``PYTHONPATH=tests/helpers pytest -p cpu_times`` prints the rooms and the tests that take the most. Counted are
user and system seconds of the test's process, with its threads, and of its child processes that have ended.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Generator
from pathlib import Path

import pytest

MOST = 40
PROPERTY = "cpu_seconds"

_last = 0.0
_tests: dict[str, float] = collections.defaultdict(float)


def _seconds() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart() -> None:
    global _last
    _last = _seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Setup, call and teardown each; the fixtures of a module count for the test that is the first to need them."""
    global _last
    report = yield
    now = _seconds()
    report.user_properties = [*report.user_properties, (PROPERTY, now - _last)]
    _last = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With several processes, in the one that prints."""
    _tests[report.nodeid] += sum(float(str(value)) for name, value in report.user_properties if name == PROPERTY)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rooms: dict[str, float] = collections.defaultdict(float)
    for name, seconds in _tests.items():
        rooms[str(Path(name.partition("::")[0]).parent)] += seconds
    terminalreporter.section("CPU seconds")
    for found in (rooms, _tests):
        for name, seconds in sorted(found.items(), key=lambda each: -each[1])[:MOST]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line("")
