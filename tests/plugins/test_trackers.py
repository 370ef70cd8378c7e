"""What the plugins that record runs write, and that it stays whole."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
import socket
import struct
import sys
import threading
import types
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune import LoraTrainer
from ciphertune.errors import PluginError, SelectionError
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager
from ciphertune.tracker import Tracker
from ciphertune.traffic import Exchange, Traffic

BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(n)), torch.zeros(8, 2)) for n in range(5)]


def trainer_of(plugins: PluginManager, to: str = "clear", **arguments: Any) -> LoraTrainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    net[2].requires_grad_(False)
    ciphertune.outsource(net, to, plugins=plugins)
    arguments = {"loss_fn": nn.functional.mse_loss, "learning_rate": 0.1, "eval_every": 2, **arguments}
    return LoraTrainer(net, plugins=plugins, **arguments)


def csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def jsonl_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Stop(Exception):
    pass


def stopping_at(step: int) -> Any:
    """A loss function that fails within a step."""
    calls = []

    def loss_fn(outputs: Any, targets: Any) -> Any:
        calls.append(outputs.requires_grad)
        if sum(calls) == step:
            raise Stop
        return nn.functional.mse_loss(outputs, targets)

    return loss_fn


# History


@pytest.mark.parametrize(("name", "read"), [("h.csv", csv_rows), ("h.jsonl", jsonl_rows)])
def test_history_has_a_row_for_every_step_and_evaluation(
    name: str, read: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, manager = tmp_path / "new" / name, PluginManager()
    manager.use(f"history?path={path}")
    assert not path.exists(), "naming a plugin writes nothing yet"
    trainer = trainer_of(manager)
    trainer.evaluate(BATCHES[:2])
    before = trainer.evaluate(BATCHES[:1])
    assert not path.exists()
    history = trainer.train(BATCHES, BATCHES[:1])
    trainer.evaluate(BATCHES[:1])
    rows = read(path)
    assert [(row["kind"], int(row["step"])) for row in rows] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
        ("evaluation", 4),
        ("step", 5),
        ("evaluation", 5),
    ]
    steps = [row for row in rows if row["kind"] == "step"]
    for row, entry in zip(steps, history.steps, strict=True):
        for key in ("loss", "learning_rate", "grad_norm", "seconds", "samples"):
            assert float(row[key]) == entry[key]
        assert (int(row["requests"]), int(row["bytes_up"]), int(row["retries"])) == (2, 8 * 6 * 4 * 2, 0)
    losses = [float(row["eval_loss"]) for row in rows if row["kind"] == "evaluation"]
    assert losses[:3] == [before["eval_loss"], *(entry["eval_loss"] for entry in history.evaluations)]
    assert all(int(row["requests"]) == 1 for row in rows if row["kind"] == "evaluation")


@pytest.mark.parametrize(("name", "read"), [("h.csv", csv_rows), ("h.jsonl", jsonl_rows)])
def test_history_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    name: str, read: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    whole, path = tmp_path / f"whole-{name}", tmp_path / name
    with_whole, first, second = PluginManager(), PluginManager(), PluginManager()
    with_whole.use(f"history?path={whole}")
    trainer_of(with_whole, steps=10).train(BATCHES, BATCHES[:1])
    checkpoints: dict[str, Any] = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": 3}
    first.use(f"history?path={path}")
    with pytest.raises(Stop):
        trainer_of(first, steps=10, loss_fn=stopping_at(9), **checkpoints).train(BATCHES, BATCHES[:1])
    assert [int(row["step"]) for row in read(path) if row["kind"] == "step"] == list(range(1, 9))
    # A killed process may leave half a line, and a sick disk anything.
    path.write_bytes(path.read_bytes() + b"garbage,\xff\n" + b'step,7,{"kind": "step", "st')
    second.use(f"history?path={path}")
    resumed = trainer_of(second, steps=10, **checkpoints)
    resumed.evaluate(BATCHES)  # of a fresh model: not part of the run
    resumed.train(BATCHES, BATCHES[:1], resume=True)
    keys = ("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "samples", "eval_loss", "bytes_down")
    expected = [[row.get(key) for key in keys] for row in read(whole)]
    assert [[row.get(key) for key in keys] for row in read(path)] == expected
    assert list(tmp_path.glob(".draft*")) == []


def test_history_of_another_run_begins_anew_and_other_files_are_left_alone(tmp_path: Path) -> None:
    for name, read in (("h.csv", csv_rows), ("h.jsonl", jsonl_rows)):
        path = tmp_path / name
        for _ in range(2):
            with PluginManager().using(f"history?path={path}") as (plugin,):
                manager = PluginManager()
                manager.register(plugin)
                trainer_of(manager, eval_every=None).train(BATCHES)
            assert sum(row["kind"] == "step" for row in read(path)) == 5
    for name, content in (("a.csv", "name,age\nAda,36\n"), ("b.jsonl", '{"text": "private"}\n'), ("c.csv", "x")):
        foreign = tmp_path / name
        foreign.write_text(content)
        with pytest.raises(PluginError, match="is not a history") as error:
            PluginManager().use(f"history?path={foreign}")
        assert "private" not in str(error.value)
        assert foreign.read_text() == content
    (tmp_path / "empty.csv").touch()
    PluginManager().use(f"history?path={tmp_path / 'empty.csv'}")
    with pytest.raises(SelectionError, match=r"must end in \.csv or \.jsonl"):
        PluginManager().use(f"history?path={tmp_path / 'h.txt'}")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(PluginError, match="cannot use .*folder.csv"):
        PluginManager().use(f"history?path={tmp_path / 'folder.csv'}")


def test_history_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, manager = tmp_path / "h.jsonl", PluginManager()
    manager.use(f"history?path={path}")
    trainer = trainer_of(manager, eval_every=None)
    write, calls = registry.load(registry.PLUGINS, "history").record.__globals__["os"].write, []

    def half(file: int, line: bytes) -> int:
        calls.append(line)
        return write(file, line[: len(line) // 2]) if len(calls) == 2 else write(file, line)

    monkeypatch.setattr("os.write", half)
    with pytest.warns(RuntimeWarning, match="'history' failed in ciphertune_training_step: OSError: the disk is full"):
        history = trainer.train(BATCHES)
    assert len(history.losses) == 5
    assert [row["step"] for row in jsonl_rows(path)] == [1, 3, 4, 5]
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "h.csv", Path("/proc/nowhere/h.csv")):
        with pytest.raises(PluginError, match=rf"plugin 'history': cannot (use|write) {place}: \w+"):
            PluginManager().use(f"history?path={place}")
    manager = PluginManager()
    manager.use(f"history?path={tmp_path / 'gone' / 'h.csv'}")
    (tmp_path / "gone").rmdir()
    with pytest.warns(RuntimeWarning, match="'history' failed in ciphertune_training_start"):
        trainer_of(manager, eval_every=None).train(BATCHES)


def test_infinity_is_no_json_and_columns_are_stable(tmp_path: Path) -> None:
    manager = PluginManager()
    for name in ("h.csv", "h.jsonl"):
        manager.use(f"history?path={tmp_path / name}")
    trainer = trainer_of(PluginManager())
    manager.observe("ciphertune_training_start", trainer=trainer, total_steps=1, start_step=0)
    measured = {"eval_loss": 800.0, "perplexity": float("inf"), "of_later_versions": 2.0}
    manager.observe("ciphertune_evaluation", trainer=trainer, step=0, metrics=measured)
    (row,) = jsonl_rows(tmp_path / "h.jsonl")
    assert (row["perplexity"], row["of_later_versions"]) == (None, 2.0)
    assert (tmp_path / "h.csv").read_text().splitlines()[0] == (
        "kind,step,epoch,loss,learning_rate,grad_norm,seconds,tokens,samples,eval_loss,perplexity,"
        "requests,retries,bytes_up,bytes_down,time"
    )
    (columns,) = csv_rows(tmp_path / "h.csv")
    assert (columns["perplexity"], columns["loss"]) == ("inf", "")


# What they have in common


class Log(Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def begin(self, trainer: Any, total_steps: int, start_step: int) -> None:
        self.seen.append(("begin", total_steps, start_step))

    def record(self, kind: str, step: int, metrics: Any) -> None:
        self.seen.append((kind, step, metrics["requests"]))

    def end(self, step: int, reason: str) -> None:
        self.seen.append(("end", step, reason))


def test_a_tracker_follows_one_run_at_a_time() -> None:
    manager, log = PluginManager(), Log()
    inner = trainer_of(manager, eval_every=None)

    class Nested:
        @ciphertune.hookspecs.hookimpl
        def ciphertune_training_step(self, trainer: Any, step: int) -> None:
            if trainer is not inner and step == 1:
                inner.train(BATCHES)

    manager.register(Nested())
    manager.register(log, "log")  # called before the other
    outer = trainer_of(manager, eval_every=None)
    with pytest.warns(RuntimeWarning, match="'log' failed in ciphertune_training_start: PluginError: another run") as w:
        outer.train(BATCHES[:2])
    assert len(w) == 1
    inner.evaluate(BATCHES)
    # The nested run's ten requests come between the steps.
    assert log.seen == [("begin", 2, 0), ("step", 1, 2), ("step", 2, 12), ("end", 2, "finished")]
    inner.train(BATCHES[:1])
    assert [entry[0] for entry in log.seen[4:]] == ["begin", "step", "end"]


# Traffic


def test_traffic_adds_up_to_what_the_session_counted(tmp_path: Path, tiny: Any) -> None:
    path, manager = tmp_path / "deep" / "traffic.json", PluginManager()
    plugin = manager.use(f"traffic?path={path}")
    net = ciphertune.outsource(tiny("llama"), "clear", plugins=manager)
    session = ciphertune.session_of(net)
    for _ in range(3):
        net(torch.arange(8)[None]).logits.sum().backward()
    assert not path.exists()
    session.close()
    found = json.loads(path.read_text())
    for name, value in vars(session.traffic).items():
        assert found["total"][name] == pytest.approx(value), name
    groups = found["groups"]
    assert {group["direction"] for group in groups} == {"forward", "backward"}
    assert sum(group["products"] for group in groups) == found["total"]["products"] == found["total"]["requests"]
    qkv = [group for group in groups if any("q_proj" in layer for layer in group["layers"])]
    assert {len(group["layers"]) for group in qkv} == {3}
    assert all(group["products"] == 3 and group["tokens"] == 24 for group in qkv)
    sizes = [group["bytes_up"] + group["bytes_down"] for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    path.unlink()
    plugin.close()
    assert not path.exists(), "nothing new to report"


def test_traffic_tells_of_set_ups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    told = []
    for use in (f"traffic?path={tmp_path / 'traffic.json'}", "traffic"):
        manager = PluginManager()
        manager.use(use)
        net = ciphertune.outsource(nn.Sequential(nn.Linear(16, 8)), "mlwe?hint_disk=0", layers="all", plugins=manager)
        session = ciphertune.session_of(net)
        net(torch.ones(1, 16))
        session.close()
        told.append(session.set_up)
    assert json.loads((tmp_path / "traffic.json").read_text())["set_up"] == dataclasses.asdict(told[0])
    assert told[0].weights == 128
    assert f"set-up: 0.0 million weights read, 0.0 MB down, {told[1].seconds:.2f} s\n" in terminal.getvalue()


def test_traffic_of_many_threads_is_complete() -> None:
    plugin = PluginManager().use("traffic")

    def reply() -> None:
        for _ in range(500):
            costs = dataclasses.asdict(Traffic(requests=2, bytes_up=5, wait_seconds=0.5))
            plugin.ciphertune_after_reply(Exchange(layers=("a",), direction="forward", tokens=3, **costs))

    threads = [threading.Thread(target=reply) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = plugin.rows()
    assert (row["products"], row["tokens"], row["requests"], row["bytes_up"]) == (4000, 12000, 8000, 20000)
    assert row["wait_seconds"] == 2000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_traffic_on_a_terminal_is_a_table_by_kind_of_layer(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    plugin = PluginManager().use("traffic")
    for n in (0, 1, 11):
        layers = tuple(f"model.layers.{n}.self_attn.{p}_proj" for p in "qkv")
        costs = Traffic(1, 0, 3_000_000, 500_000, 0.25, 2.0, 1.5, 0.25)
        plugin.ciphertune_after_reply(
            Exchange(layers=layers, direction="forward", tokens=7, **dataclasses.asdict(costs))
        )
        costs = Traffic(2, 1, 10**9)
        up = (f"model.layers.{n}.mlp.up",)
        plugin.ciphertune_after_reply(Exchange(layers=up, direction="backward", tokens=7, **dataclasses.asdict(costs)))
    plugin.ciphertune_training_end()
    plugin.ciphertune_session_closed()
    heading, *lines = terminal.getvalue().splitlines()
    assert heading.split("  ")[-1] == "eval s"
    assert [line.split() for line in lines] == [
        ["model.layers.*.mlp.up"],
        ["backward", "6", "3", "21", "3000.0", "0.0", "0.00", "0.00", "0.00"],
        ["model.layers.*.self_attn.{q_proj,k_proj,v_proj}"],
        ["forward", "3", "0", "21", "9.0", "1.5", "1.50", "6.00", "4.50"],
        ["all", "9", "3", "42", "3009.0", "1.5", "1.50", "6.00", "4.50"],
    ]
    assert max(map(len, (heading, *lines))) <= 80
    assert len({len(line) for line in (heading, *lines) if "model" not in line}) == 1
    assert capsys.readouterr().out == ""


# TensorBoard


def events(folder: Path) -> list[Any]:
    """All events in a folder: records of length, check, protocol buffer, check."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name.rpartition(".")[2])):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def scalars(found: list[Any]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in found:
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def test_tensorboard_has_the_curves_and_nothing_else(tmp_path: Path) -> None:
    manager = PluginManager()
    manager.use(f"tensorboard?folder={tmp_path / 'runs' / 'one'}")
    trainer = trainer_of(manager, checkpoint_dir=tmp_path / "c", checkpoint_every=1)
    history = trainer.train(BATCHES, BATCHES[:1])
    trainer.evaluate(BATCHES[:1])
    found = events(tmp_path / "runs" / "one")
    curves = scalars(found)
    assert set(curves) == {
        *("train/loss", "train/learning_rate", "train/grad_norm", "train/seconds", "train/samples_per_second"),
        *("traffic/bytes_up", "traffic/bytes_down", "traffic/retries", "eval/loss"),
    }
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5]
    assert [value for _, value in curves["train/loss"]] == pytest.approx(history.losses)
    assert {value for _, value in curves["traffic/bytes_up"]} == {8 * 6 * 4 * 2}
    assert [step for step, _ in curves["eval/loss"]] == [2, 4, 5]
    for event in found:
        assert event.WhichOneof("what") in ("summary", "file_version", "session_log")
        assert all(value.WhichOneof("value") == "simple_value" for value in event.summary.value)
    trainer_of(manager, steps=7, checkpoint_dir=tmp_path / "c").train(BATCHES, BATCHES[:1], resume=True)
    starts = [event.step for event in events(tmp_path / "runs" / "one") if event.HasField("session_log")]
    assert starts == [1, 6], "TensorBoard drops steps from here on that it read before"


# Prometheus


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_prometheus_serves_while_something_goes_on() -> None:
    manager, seen = PluginManager(), []
    plugin = manager.use("prometheus?port=0")
    assert plugin.port is None

    class Scraper:
        @ciphertune.hookspecs.hookimpl(tryfirst=True)
        def ciphertune_training_end(self) -> None:
            seen.append(scrape(plugin.port))

    manager.register(Scraper())
    trainer = trainer_of(manager)
    session = ciphertune.session_of(trainer.model)
    port = plugin.port
    history = trainer.train(BATCHES, BATCHES[:1])
    (values,) = seen
    traffic = session.traffic
    both = ("forward", "backward")
    for name, total in (("requests", traffic.requests), ("retries", traffic.retries)):
        assert sum(values[f'ciphertune_client_{name}_total{{direction="{d}"}}'] for d in both) == total
    for way in ("up", "down"):
        found = sum(values[f'ciphertune_client_bytes_total{{direction="{d}",way="{way}"}}'] for d in both)
        assert found == getattr(traffic, f"bytes_{way}")
    waits = [values[f'ciphertune_client_phase_seconds_total{{direction="{d}",phase="wait"}}'] for d in both]
    assert sum(waits) == pytest.approx(traffic.wait_seconds)
    assert values['ciphertune_client_product_seconds_count{direction="backward"}'] == 5
    assert values["ciphertune_client_set_up_weights"] == session.set_up.weights == 0, "clear prepares nothing"
    assert values["ciphertune_training_step"] == values["ciphertune_training_total_steps"] == 5
    assert values["ciphertune_training_loss"] == pytest.approx(history.losses[-1])
    assert values["ciphertune_training_eval_loss"] == pytest.approx(history.evaluations[-1]["eval_loss"])
    assert plugin.port == port, "the session is still open"
    session.close()
    assert plugin.port is None
    with pytest.raises(OSError, match="refused"):
        scrape(port)  # type: ignore[arg-type]


def test_a_port_that_is_taken_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        manager = PluginManager()
        manager.use(f"prometheus?port={port}")
        with pytest.warns(RuntimeWarning, match=f"cannot serve metrics at 127.0.0.1:{port}"):
            trainer = trainer_of(manager, eval_every=None)
        with pytest.warns(RuntimeWarning, match="'prometheus' failed in ciphertune_training_start"):
            assert len(trainer.train(BATCHES).losses) == 5
        ciphertune.session_of(trainer.model).close()
    with pytest.raises(SelectionError, match="port=70000 must be from 0 to 65535"):
        PluginManager().use("prometheus?port=70000")


# MLflow


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def test_mlflow_has_settings_metrics_and_how_it_ended(store: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    manager, client = PluginManager(), MlflowClient(store)
    plugin = manager.use(f"mlflow?uri={store}&experiment=private tuning&run=first")
    trainer = trainer_of(manager, "mlwe?mask_memory=77", checkpoint_dir=tmp_path / "c", checkpoint_every=1)
    history = trainer.train(BATCHES, BATCHES[:1])
    run = client.get_run(plugin.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.info.experiment_id == client.get_experiment_by_name("private tuning").experiment_id
    losses = client.get_metric_history(plugin.run_id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == list(enumerate(history.losses, 1))
    assert {metric.step for metric in client.get_metric_history(plugin.run_id, "eval_loss")} == {2, 4}
    assert run.data.metrics["bytes_up"] > 0
    params = run.data.params
    assert (params["backend"], params["transport"], params["optimizer"]) == ("mlwe", "local", "AdamW")
    assert (params["learning_rate"], params["total_steps"], params["outsourced_layers"]) == ("0.1", "5", "1")
    assert params["backend.mask_memory"] == "77"
    assert float(params["security_bits"]) >= 128
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert files
    assert not any("secret" in path.read_text() for path in files)
    trainer.evaluate(BATCHES[:1])
    assert len(client.get_metric_history(plugin.run_id, "eval_loss")) == 3
    assert client.get_run(plugin.run_id).info.status == "FINISHED"
    again = trainer_of(manager, "mlwe?mask_memory=77", steps=6, checkpoint_dir=tmp_path / "c")
    again.train(BATCHES, BATCHES[:1], resume=True)
    resumed = client.get_run(plugin.run_id)
    assert resumed.info.run_id != run.info.run_id
    assert resumed.data.tags["ciphertune.resumed_at_step"] == "5"
    assert [metric.step for metric in client.get_metric_history(plugin.run_id, "loss")] == [6]


def test_mlflow_draws_nothing_from_the_generator_that_training_may_use(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.utils import name_utils

    manager = PluginManager()
    plugin = manager.use(f"mlflow?uri={store}")
    # For each leading zero of an identifier MLflow draws a digit.
    zeros = types.SimpleNamespace(int=int("7" + "0" * 17 + "1"))
    monkeypatch.setattr(name_utils, "uuid", types.SimpleNamespace(uuid4=lambda: zeros))
    before = random.getstate()
    trainer_of(manager).train(BATCHES, BATCHES[:1])
    assert plugin.run_id is not None
    assert random.getstate() == before


@pytest.mark.parametrize(("error", "status"), [(Stop, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_mlflow_runs_that_do_not_finish(error: type[BaseException], status: str, store: str) -> None:
    from mlflow import MlflowClient

    def loss_fn(outputs: Any, targets: Any) -> Any:
        raise error

    manager = PluginManager()
    plugin = manager.use(f"mlflow?uri={store}")
    with pytest.raises(error):
        trainer_of(manager, loss_fn=loss_fn).train(BATCHES, BATCHES[:1])
    assert MlflowClient(store).get_run(plugin.run_id).info.status == status


def test_a_server_that_is_away_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    manager = PluginManager()
    plugin = manager.use(f"mlflow?uri=http://127.0.0.1:{port}&wait=10")
    expected = trainer_of(PluginManager()).train(BATCHES, BATCHES[:1]).losses
    with pytest.warns(RuntimeWarning, match="'mlflow' failed in .*: PluginError: MLflow could not be told") as w:
        assert trainer_of(manager).train(BATCHES, BATCHES[:1]).losses == expected
    assert any("in ciphertune_training_end" in str(warning.message) for warning in w)
    assert plugin.run_id is None
    assert not any(thread.name == "ciphertune-mlflow" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        ("mlflow?uri=https://me:word@host/", SelectionError, "MLFLOW_TRACKING_PASSWORD"),
        ("mlflow?wait=-1", SelectionError, "wait=-1.0 must be a number of seconds"),
        ("mlflow?uri=gopher://x", PluginError, "MLflow cannot use gopher://x"),
    ],
)
def test_mlflow_options_that_are_refused(use: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as found:
        PluginManager().use(use)
    assert "word@" not in str(found.value)
