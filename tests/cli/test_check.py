"""``ciphertune check``: the suites against installed plugins, without a test file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from click.testing import CliRunner, Result
from shipped import ship

from ciphertune.cli import check as check, cli
from ciphertune.cli.check import run_suite
from ciphertune.errors import ConfigError, PluginError, SelectionError
from ciphertune.plugins import registry

STRANGER = """
import os
from ciphertune import get_backend

class Stranger(get_backend("clear")):
    name = "stranger"

    @property
    def security(self):
        from ciphertune.backend import SecurityStatement
        return SecurityStatement(True, 128, "claims a lot")

class Crashing(get_backend("clear")):
    name = "crashing"

    def client(self, device):
        os.abort()
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[ciphertune.backends]\nstranger = strangers:Stranger\ncrashing = strangers:Crashing\n"
    ship(tmp_path, "strangers", points, strangers=STRANGER)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


# What holds of a process that starts anew has tests of its own here.
_SUITE = """
import os, sys
number = int(sys.argv[1])
os.dup2(os.open(f"/proc/{os.getppid()}/fd/{number}", os.O_WRONLY), number)
print("open", flush=True)
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite runs in a process of its own that has imported torch already."""
    if not sys.platform.startswith("linux"):
        return

    @contextlib.contextmanager
    def start(command: list[str], *, env: dict[str, str], pass_fds: tuple[int], **_: Any) -> Iterator[Any]:
        process = warm.start([str(pass_fds[0]), *command[3:]], warm.TORCH, code=_SUITE, env=env)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "open\n"
            yield types.SimpleNamespace(kill=process.kill, wait=lambda: process.wait(600))

    monkeypatch.setattr(check, "subprocess", types.SimpleNamespace(Popen=start, DEVNULL=None, STDOUT=None))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["check", *arguments])


def test_a_good_plugin_passes_and_says_what_was_left_out() -> None:
    result = invoke("clear?weight_bits=8", "--only", "zeros or gives", "--set", "repeats=4")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].startswith("backend clear?weight_bits=8 of ciphertune ")
    assert "  passed  tokens of zeros" in result.output
    assert "skipped a request gives nothing away: this backend says that it encrypts nothing" in result.output
    assert result.output.splitlines()[-1] == "1 passed, 0 failed, 3 skipped"


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("name", "only"), [("flaky", "needs or belongs"), ("flaky::zmq", "interface or without")])
def test_a_transport_around_others_has_a_suite_of_its_own(name: str, only: str) -> None:
    result = invoke(name, "--only", only)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"transport {name} of ciphertune ")
    assert ("it needs another" in result.output) == (name == "flaky")


@pytest.mark.usefixtures("forked")
def test_results_for_programs() -> None:
    result = invoke("progress", "--only", "hooks", "--json")
    (report,) = json.loads(result.output)
    assert (report["kind"], report["name"], report["passes"]) == ("plugin", "progress", True)
    assert {row["outcome"] for row in report["results"]} == {"passed"}
    assert "Every function named like a hook is one, and is marked as an implementation." in [
        row["about"] for row in report["results"]
    ]


@pytest.mark.usefixtures("strangers", "forked")
def test_a_bad_plugin_fails_with_the_reason() -> None:
    results = {row["test"]: row for row in run_suite(registry.BACKENDS, "stranger", only="gives or zeros")}
    assert results["tokens of zeros"]["outcome"] == "passed"
    found = results["a request gives nothing away"]
    assert found["outcome"] == "failed"
    assert "a constant part of the request depends on the data" in found["reason"]
    assert "testing/backends.py:" in found["reason"]


@pytest.mark.usefixtures("strangers", "forked")
def test_one_that_ends_the_process_is_told_in_one_line() -> None:
    with pytest.raises(PluginError, match="the suite of 'crashing' ended with signal 6"):
        list(run_suite(registry.BACKENDS, "crashing", only="zeros"))


@pytest.mark.usefixtures("forked")
def test_nothing_that_passes_is_no_pass() -> None:
    assert invoke("simulation", "--only", "prepared").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["mlew"], SelectionError, "no plugin named 'mlew' is installed; did you mean 'mlwe'?"),
        (["zmq", "--kind", "backend"], SelectionError, "no plugin named 'zmq' is installed"),
        (["local"], SelectionError, "'local' serves none"),
        (["flaky::local"], SelectionError, "'flaky::local' serves none"),
        (["zmq::local"], SelectionError, "the transport 'zmq' wraps no other"),
        (["history"], SelectionError, "'history' needs options: ciphertune check 'history?path=…'"),
        (["clear?weight_bit=8"], SelectionError, "weight_bits"),
        (["progress?a=1"], SelectionError, "'progress?a=1': this plugin takes no options"),
        (["clear", "--set", "tolerence=1"], ConfigError, "BackendSuite has no attribute 'tolerence'; did you mean"),
        (["a b"], SelectionError, "cannot read the plugin"),
    ],
)
def test_what_cannot_be_checked(arguments: list[str], error: type[Exception], said: str) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, error)
    assert said in str(result.exception)
