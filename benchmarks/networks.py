"""Training over a slow line that loses packets, held against what ``ciphertune plan`` says of the line without losses.

``python benchmarks/networks.py`` needs root on Linux, and takes some minutes: client and worker are in network
namespaces of their own (``link.py``), on a core each, and train a small model of random weights. Both namespaces are
removed in the end. It writes ``networks.json`` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from link import WORKER, Ends, line, missing
from predict import CORES, environment, on
from sweep import machine

import ciphertune
from ciphertune.planning.plan import bytes_per_second, make_plan, seconds
from ciphertune.planning.speeds import Speeds, read_speeds
from ciphertune_zmq import ZmqTransport

HERE = Path(__file__).parent
PORT = 5555
START_SECONDS = 120
GO_ON = {"net.ipv4.tcp_slow_start_after_idle": "0"}
BBR = {**GO_ON, "net.ipv4.tcp_congestion_control": "bbr"}
RENO = {**GO_ON, "net.ipv4.tcp_congestion_control": "reno"}
SYSTEMS: dict[str, dict[str, str]] = {
    "reno": {"net.ipv4.tcp_congestion_control": "reno"},
    "reno, no slow start after idle": RENO,
    "bbr, no slow start after idle": BBR,
}
"""Settings of both ends' systems."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run."""

    loss: float
    system: str
    micro_batches: int = 1
    interleave: int = 1


def cases(losses: list[float]) -> list[Case]:
    found = [Case(loss, system) for system in SYSTEMS for loss in sorted({0.0, *losses})]
    return [*found, Case(0.0, "bbr, no slow start after idle", 2, 1), Case(0.0, "bbr, no slow start after idle", 2, 2)]


def small_model(folder: Path) -> None:
    """A Llama of two blocks with random weights, and a tokenizer, which folders of models have."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)  # noqa: S106


@contextlib.contextmanager
def worker(ends: Ends, bundle: Path, keys: Path) -> Iterator[None]:
    """A worker in its namespace, on a core of its own."""
    command = [*ends.within(ends.worker), sys.executable, "-m", "ciphertune", "worker", str(bundle / "worker")]
    command += ["--bind", f"tcp://{WORKER}:{PORT}", "--curve", str(keys), "--threads", "1"]
    with on(CORES[-1]):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(pin=True))
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        said = process.stdout.readline() if readable else ""
        if not said.startswith("ready "):
            raise RuntimeError(f"the worker did not start: {said or 'no output'}")
        yield
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def run(case: Case, arguments: Any, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of a step, of a training run that came to its end."""
    keys = folder / "keys"
    request = {"model_name": str(folder / "model"), "tokens": arguments.tokens, "count": arguments.steps + 1, "seed": 0}
    request |= {"to": f"mlwe+zmq://{WORKER}:{PORT}?curve={keys}&timeout=120", "micro_batches": case.micro_batches}
    request["interleave"] = case.interleave
    latency, rate = seconds(arguments.latency), bytes_per_second(arguments.bandwidth)
    with line(latency, rate, case.loss, SYSTEMS[case.system]) as ends, worker(ends, folder / "bundle", keys):
        command = [*ends.within(ends.client), sys.executable, "-m", "ciphertune.bench.child", json.dumps(request)]
        with on(CORES[0]):
            begun = time.monotonic()
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**environment(pin=True), "CIPHERTUNE_CACHE": str(folder / "cache")},
            )
            took = time.monotonic() - begun
    found = json.loads(done.stdout.strip().splitlines()[-1])
    traffic = found["traffic"][-1]
    return {
        "seconds": statistics.median(found["seconds"][1:]),
        "all_seconds": [round(each, 2) for each in found["seconds"]],
        "whole_run_s": took,
        "requests": traffic["requests"],
        "bytes": traffic["bytes_up"] + traffic["bytes_down"],
    }


def speeds_here(arguments: Any, folder: Path) -> Speeds:
    path = folder / "speeds.json"
    command = [sys.executable, "-m", "ciphertune", "plan", str(folder / "model"), "--to", "mlwe+zmq://", "--json"]
    command += ["--tokens", str(arguments.tokens), "--save-speeds", str(path)]
    with on(CORES[0]):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment(pin=True))
    return read_speeds(path)


def planned(case: Case, arguments: Any, folder: Path, speeds: Speeds) -> tuple[float, int]:
    """Seconds and bytes of a step of the line without losses."""
    plan = make_plan(
        str(folder / "model"),
        "mlwe+zmq://",
        tokens=arguments.tokens,
        bandwidth=bytes_per_second(arguments.bandwidth),
        latency=seconds(arguments.latency),
        micro_batches=case.micro_batches,
        interleave=case.interleave,
        client=speeds,
        worker=speeds,
    )
    assert plan.estimate is not None
    return plan.estimate.total, plan.bytes_up + plan.bytes_down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", default="100ms", help="one way")
    parser.add_argument("--bandwidth", default="50Mbit/s", help="each way")
    parser.add_argument("--loss", type=float, nargs="*", default=[0.01], help="share of packets, each way")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="that are timed, after one that is not")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    parser.add_argument("--json", type=Path, default=HERE / "networks.json")
    arguments = parser.parse_args()
    if why := missing():
        parser.error(why)
    load, rows = os.getloadavg()[0], []
    chosen = cases(arguments.loss)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_model(folder / "model")
        ciphertune.split(str(folder / "model"), folder / "bundle", calibration="off")
        ZmqTransport.make_keys(folder / "keys", ("client",), worker=True)
        speeds = speeds_here(arguments, folder)
        for case in [chosen[i] for i in arguments.only] if arguments.only else chosen:
            told, sent = planned(case, arguments, folder, speeds)
            real = run(case, arguments, folder)
            assert sent == real["bytes"], "what was sent is not what was planned"
            rows.append({**dataclasses.asdict(case), "measured": real, "predicted_s": told})
            off = real["seconds"] / told
            print(
                f"{case.loss:.0%} lost, {case.system}, {case.micro_batches} micro-batches, {case.interleave} at once: "
                f"{real['seconds']:.2f} s a step measured, {told:.2f} s planned without losses: {off:.2f} of it",
                flush=True,
            )
            asked = {key: getattr(arguments, key) for key in ("latency", "bandwidth", "tokens", "steps")}
            result = {"machine": machine(load), **asked, "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
