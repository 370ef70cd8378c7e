"""A plan of a run's file: its steps, its traffic and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import ciphertune
from ciphertune.cli import cli
from ciphertune.cli.plan_summary import duration
from ciphertune.errors import ConfigError
from ciphertune.planning.plan import bytes_per_second, make_plan, seconds
from ciphertune.runs.config import load_config
from ciphertune.runs.train import run_training

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_the_traffic_of_a_run_is_what_was_planned(project: Path) -> None:
    arguments = ["plan", str(project / "run.toml"), "--no-measure", "--json"]
    found = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    run, whole = found["run"], found["run"]["totals"]
    assert (run["steps"], run["tokens"], run["length"], run["held"], run["evaluations"]) == (8, 128, 16, 17, 3)
    assert (whole["seconds"], found["evaluation"]["seconds"]) == (None, None)
    done = run_training(load_config(project / "run.toml"))
    assert (whole["bytes_up"], whole["bytes_down"]) == (done.traffic["bytes_up"], done.traffic["bytes_down"])


def test_a_run_is_summed_up_in_plain_words_first(project: Path) -> None:
    file = project / "mine.toml"
    file.write_text((project / "run.toml").read_text() + '[lora]\ntarget_modules = "all-linear"\n')
    arguments = ["plan", str(file), "--to", "mlwe", "--up", "5 Mbit/s", "--down", "50Mbps", "--latency", "20 ms"]
    text = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    first = " ".join(text[: text.index("A step of 128 tokens")].replace("\u2502", " ").split())
    for words in ("the whole run about", "8 steps of about 128 tokens", "3 of 17 sequences, about", "set-up, once",
                  "client: this machine", "most of a step is", "a worker: 0.0 MB"):  # fmt: skip
        assert words in first
    with pytest.raises(ConfigError, match="--tokens, --target: a run's file says this"):
        CliRunner().invoke(cli, [*arguments, "--tokens", "5", "--target", "x"], catch_exceptions=False)


def test_the_client_s_part_of_a_bundle_is_planned(project: Path) -> None:
    ciphertune.split(str(project / "model"), project / "bundle")
    file = project / "mine.toml"
    file.write_text((project / "run.toml").read_text().replace('"model"', '"bundle/client"'))
    for what in (project / "bundle" / "client", file):
        done = CliRunner().invoke(cli, ["plan", str(what), "--to", "mlwe", "--no-measure", "--json"])
        assert json.loads(done.stdout)["set_up_bytes"] == json.loads(done.stdout)["prepared_codes"] > 0


def test_a_slower_way_down_takes_longer(project: Path) -> None:
    model = str(project / "model")
    plans = [make_plan(model, "clear", tokens=32, bandwidth=1e6, down=down) for down in (1e6, 1e4)]
    even, uneven = (plan.estimate for plan in plans)
    assert even is not None
    assert uneven is not None
    assert uneven.path["downlink"] > 10 * even.path["downlink"]


@pytest.mark.parametrize(
    "text",
    ["50 Mbit/s", "50Mbit/s", "50 mbit/s", "50Mbps", "50 Mb/s", "6.25MB/s", "6.25 MBps", "6250 kB/s", "50 Mbits/sec"],
)
def test_bandwidths_as_people_write_them(text: str) -> None:
    assert bytes_per_second(text) == 6.25e6


@pytest.mark.parametrize("text", ["20ms", "20 ms", "0.02s", "0.02 sec", "20 msec", "20 milliseconds", "0.02 seconds"])
def test_times_as_people_write_them(text: str) -> None:
    assert seconds(text) == pytest.approx(0.02)


def test_durations() -> None:
    assert [duration(value) for value in (0.25, 9.9, 42, 600, 9000)] == ["0.25 s", "9.9 s", "42 s", "10 min", "2.5 h"]
