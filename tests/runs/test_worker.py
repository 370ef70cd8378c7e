"""A worker as its file describes it: several bundles and keys, read again at SIGHUP, with records of who used what."""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import sqlite3
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import remote
import torch
import warm
from click.testing import CliRunner
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune._support.notify import notify, notify_reloading, watchdog_seconds
from ciphertune.cli import cli
from ciphertune.errors import ConfigError, UnknownLayerError
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.runs.worker_config import load_worker_config

ZmqTransport = registry.load(registry.TRANSPORTS, "zmq")

FILE = """
bundles = [{bundles}]
backends = ["clear", "mlwe"]
threads = 1
audit = "sessions.sqlite"
drain = 5

{binds}

[quotas]
sessions = 8

[metrics]
port = {port}

[log]
format = "json"
"""


@pytest.fixture
def bundles(tmp_path: Path, tiny: Callable[[str], nn.Module]) -> list[Path]:
    """Two models of one architecture, so that names of layers alone tell nothing."""
    folders = []
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        model: Any = tiny("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 if name == "first" else 0.5)
        model.save_pretrained(tmp_path / name)
        ciphertune.split(str(tmp_path / name), tmp_path / "bundles" / name)
        folders.append(tmp_path / "bundles" / name)
    return folders


def bind(port: int, keys: str) -> str:
    return f'[[bind]]\naddress = "tcp://127.0.0.1:{port}"\ncurve = "{keys}"\n'


class Running:
    def __init__(self, process: warm.Process | subprocess.Popen[str], addresses: list[str], log: Path) -> None:
        self.process, self.addresses, self._log = process, addresses, log

    def said(self, message: str) -> list[dict[str, Any]]:
        """The lines of its log with this message."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line for line in lines if line["message"] == message]

    def wait(self, message: str, count: int = 1) -> dict[str, Any]:
        end = time.monotonic() + 60
        while len(self.said(message)) < count:
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.05)
        return self.said(message)[count - 1]


@contextlib.contextmanager
def running(file: Path, addresses: int) -> Iterator[Running]:
    log = file.parent / "log"
    with log.open("w") as errors:
        process = warm.start(["worker", "--config", str(file)], stderr=errors)
        try:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], remote.START_SECONDS)
            assert readable
            lines = [process.stdout.readline() for _ in range(addresses)]
            assert all(line.startswith("ready ") for line in lines), log.read_text()
            yield Running(process, [line.split()[1] for line in lines], log)
        finally:
            process.kill()
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(6)[None]).logits
    return logits


def probe(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_worker_from_its_file_to_its_bill(tmp_path: Path, bundles: list[Path]) -> None:
    first, second = bundles
    ZmqTransport.make_keys(tmp_path / "old", ("alice", "bob"), worker=True)
    ZmqTransport.make_keys(tmp_path / "new", (), worker=True)
    for name in ("alice.key", "bob.key"):
        (tmp_path / "new" / name).write_bytes((tmp_path / "old" / name).read_bytes())
        (tmp_path / "new" / name).chmod(0o600)
    for name in ("alice.pub", "bob.pub"):
        (tmp_path / "new" / "clients" / name).write_bytes((tmp_path / "old" / "clients" / name).read_bytes())
    ports = [remote.free_port() for _ in range(3)]

    def write(*names: str, binds: str) -> Path:
        folders = ", ".join(f'"bundles/{name}/worker"' for name in names)
        file = tmp_path / "worker.toml"
        file.write_text(FILE.format(bundles=folders, binds=binds, port=ports[2]))
        return file

    def to(port: int, keys: str, client: str) -> str:
        way = f"curve={tmp_path / keys}&client={client}&allow_insecure=1&weight_bits=8&connect_timeout=4"
        return f"clear+zmq://127.0.0.1:{port}?{way}"

    file = write("first", "second", binds=bind(ports[0], "old"))
    with running(file, 1) as worker:
        assert [probe(ports[2], path) for path in ("live", "ready", "metrics")] == [200, 200, 200]
        # Each client gets the bundle that its model fits, though their layers have the same names.
        alice = ciphertune.load_client(first / "client", to(ports[0], "old", "alice"))
        bob = ciphertune.load_client(second / "client", to(ports[0], "old", "bob"))
        answers = [answer(alice), answer(bob)]
        assert not torch.equal(*answers)
        assert worker.wait("session opened", 2)["backend"] == "clear"

        # A second key beside the first, and a bundle less: sessions that are open go on.
        write("first", binds=bind(ports[0], "old") + bind(ports[1], "new"))
        worker.process.send_signal(signal.SIGHUP)
        assert worker.wait("configuration read")["sessions"] == 2
        assert torch.equal(answer(bob), answers[1])
        by_new_key = ciphertune.load_client(first / "client", to(ports[1], "new", "alice"))
        assert torch.equal(answer(by_new_key), answers[0])
        with pytest.raises(UnknownLayerError):
            ciphertune.load_client(second / "client", to(ports[0], "old", "bob"))

        # What cannot be used changes nothing.
        file.write_text("bundles = 3")
        worker.process.send_signal(signal.SIGHUP)
        worker.wait(
            "the configuration cannot be used, and nothing has changed: bundles must be a list of strings, not 3"
        )
        assert torch.equal(answer(alice), answers[0])

        # The old key is invalid once its address is gone.
        write("first", binds=bind(ports[1], "new"))
        worker.process.send_signal(signal.SIGHUP)
        worker.wait("configuration read", 2)
        assert torch.equal(answer(by_new_key), answers[0])
        session_of(by_new_key).close()
        assert worker.wait("session ended")["products"] > 0
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0
        assert worker.said("stopped")[0]["drained"] is True

    audit = tmp_path / "sessions.sqlite"
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600
    found = CliRunner().invoke(cli, ["usage", str(audit), "--curve", str(tmp_path / "new"), "--json"])
    assert found.exit_code == 0, found.output
    by_client = {row["client"]: row for row in json.loads(found.output)}
    assert {name: row["sessions"] for name, row in by_client.items()} == {"alice": 2, "bob": 1}
    assert all(row["products"] > 0 and row["bytes_in"] > 0 and row["bytes_out"] > 0 for row in by_client.values())
    sessions = json.loads(CliRunner().invoke(cli, ["usage", str(audit), "--by", "session", "--json"]).output)
    assert {row["bundle"] for row in sessions} == {"first", "second"}
    assert all(row["ended"] >= row["opened"] for row in sessions)
    assert {row["why"] for row in sessions} == {"closed by its client", "the worker stopped"}
    none = CliRunner().invoke(cli, ["usage", str(audit), "--until", "2000-01-01"])
    assert none.output == "No session was opened in this time.\n"
    for model in (alice, bob):
        session_of(model).close()


_STUCK = """
import sys, time
from ciphertune._support.logs import log_to_stderr
from ciphertune.runs.worker import serve_worker
from ciphertune.runs.worker_config import BindSection, WorkerConfig
from ciphertune.worker.worker import Worker

Worker.handle = lambda self, request, *rest: time.sleep(600)
config = WorkerConfig(
    (sys.argv[1],), bind=(BindSection("tcp://127.0.0.1:*", insecure=True),), drain=float(sys.argv[2]),
)
with log_to_stderr("json", "info"):
    serve_worker(config, lambda at: print("ready", at, flush=True), lambda: config)
"""


@pytest.mark.slow
@pytest.mark.parametrize("drain", [1, 300])
def test_a_product_that_does_not_end_keeps_no_worker(
    tmp_path: Path, tiny: Callable[[str], nn.Module], drain: int
) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle")
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = warm.start([str(tmp_path / "bundle" / "worker"), str(drain)], code=_STUCK, stderr=errors)
    assert process.stdout is not None
    worker = Running(process, [], log)
    try:
        address = process.stdout.readline().split()[1]
        (link,) = ZmqTransport(ZmqTransport.Options(insecure=True)).connect((address,), None)
        future = link.submit(Message("evaluate"))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        told = worker.wait("waiting")
        assert (told["evaluated"], told["queued"], told["clients"]) == (1, 0, 1)
        if drain == 300:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        else:
            # The time to drain, and a few seconds for what is evaluated.
            assert process.wait(60) == 0
            assert worker.said("stopped")[0]["drained"] is False
        assert not future.done() or future.exception() is not None
        link.close()
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


def test_what_a_file_may_not_say(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"

    def problem(text: str) -> str:
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            load_worker_config(file)
        return str(error.value)

    assert problem("bind = 1\nbundles = ['a']") == "bind must be a list of sections, [[bind]], not 1"
    assert problem("threads = 2") == "bundles is missing and has no default"
    assert problem("bundles = []") == "bundles must be one name or more, not ()"
    assert "unknown key 'bind[1].adress'; did you mean 'address'" in problem("bundles = ['a']\n[[bind]]\nadress = 'x'")
    assert problem("bundles = ['a']\n[quotas]\nsessions = 0") == "quotas.sessions must be 1 or more, not 0"
    assert "bind[1].options must be a section" in problem("bundles = ['a']\n[[bind]]\noptions = { a = [1] }")
    assert "not TOML" in problem("bundles = ")


def test_systemd_is_told_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "120000000")
    assert watchdog_seconds() == 60
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify("READY=1", "STATUS=serving")
        assert listening.recv(1000) == b"READY=1\nSTATUS=serving"
        assert notify_reloading()
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", listening.recv(1000))
    assert not notify("READY=1"), "nobody listens any more"


def test_a_file_and_options_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text("bundles = ['a']")
    both = CliRunner().invoke(cli, ["worker", "--config", str(tmp_path / "worker.toml"), "--idle", "3"])
    assert both.exit_code == 2
    assert "leave out idle" in both.output
    assert "name a BUNDLE" in CliRunner().invoke(cli, ["worker"]).output


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text("bundles = ['b/worker']\naudit = 'a.sqlite'\n[[bind]]\ncurve = 'keys'")
    config = load_worker_config(tmp_path / "worker.toml")
    assert config.bundles == (str(tmp_path / "b/worker"),)
    assert config.audit == str(tmp_path / "a.sqlite")
    assert config.bind[0].listen_options == {"curve": str(tmp_path / "keys")}


def test_records_that_others_can_read_are_refused(tmp_path: Path) -> None:
    from ciphertune.worker.audit import AuditLog, read_records

    shared = tmp_path / "shared.sqlite"
    shared.touch(0o644)
    shared.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        AuditLog(shared)
    (tmp_path / "no.sqlite").write_bytes(b"no database" * 100)
    (tmp_path / "no.sqlite").chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be kept"):
        AuditLog(tmp_path / "no.sqlite")
    with pytest.raises(ConfigError, match="cannot be read as records"):
        read_records(tmp_path / "no.sqlite", 0, 1)
    with pytest.raises(ConfigError, match="does not exist"):
        read_records(tmp_path / "missing.sqlite", 0, 1)


def test_records_that_cannot_be_written_now_are_written_later(tmp_path: Path) -> None:
    from ciphertune.worker.audit import AuditLog, read_records
    from ciphertune.worker.usage import SessionRecord

    log = AuditLog(tmp_path / "a.sqlite")
    other = sqlite3.connect(tmp_path / "a.sqlite")
    log._file.execute("PRAGMA busy_timeout = 1")
    try:
        other.execute("BEGIN EXCLUSIVE")
        log.write([SessionRecord("a", "", "mlwe", 10.0, 11.0, 12.0, "idle", products=3)])
        other.rollback()
        assert read_records(tmp_path / "a.sqlite", 0, 100) == []
        log.write([])
        (found,) = read_records(tmp_path / "a.sqlite", 0, 100)
        assert (found.client, found.products, found.ended) == ("a", 3, 12.0)
        assert read_records(tmp_path / "a.sqlite", 11, 100) == []
    finally:
        other.close()
        log.close()
    assert (tmp_path / "a.sqlite").stat().st_mode & 0o077 == 0
