"""A pytest plugin that writes a line of JSON for each test that ended, for ``ciphertune check``."""

from __future__ import annotations

import inspect
import json
import os
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names where to write."""
    parser.addoption("--ciphertune-report", type=int, default=None, help="An open file descriptor.")


def pytest_configure(config: pytest.Config) -> None:
    """Report where it was asked for."""
    descriptor = config.getoption("--ciphertune-report")
    if descriptor is not None:
        config.pluginmanager.register(_Reporter(descriptor), "ciphertune-report")


class _Reporter:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        report: pytest.TestReport = yield
        if report.when == "call" or not report.passed:
            about = inspect.cleandoc(getattr(item, "function", item).__doc__ or "").split("\n\n")[0]
            found = {
                "test": item.name.removeprefix("test_").partition("[")[0].replace("_", " "),
                "case": item.name.partition("[")[2].removesuffix("]"),
                "about": " ".join(about.split()),
                "outcome": report.outcome,
                "reason": _reason(report),
                "seconds": round(report.duration, 2),
            }
            os.write(self._descriptor, (json.dumps(found) + "\n").encode())
        return report


def _reason(report: pytest.TestReport) -> str:
    """Why a test did not pass, in a line; empty for one that did."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of one that was skipped: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else f"{crash.message.splitlines()[0]} ({crash.path}:{crash.lineno})"
    return " ".join(text.split()) if crash is not None else text.strip().splitlines()[-1]
