"""What interleaving two micro-batches saves, over links with and without latency.

    python benchmarks/overlap.py                     all of it, an hour or more on a quiet machine; writes overlap.json
    python benchmarks/overlap.py --models mlp --repeat 3 --json here.json

A step's batch is computed in three ways, in turn in one process: whole, as two micro-batches one after the other, and
as two interleaved. ``local`` has the worker in the client's process, where nothing can be saved: it shows what handing
over costs. Else workers are processes behind a proxy (`benchmarks/shaped.py`) that delays every byte. ``pinned``: the
client on core 0 and the workers on core 1, which stands for machines of their own; else all share all cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shaped import shaped
from sweep import machine

from ciphertune import split
from ciphertune.bench.batches import cut_batch
from ciphertune.errors import ConfigError
from ciphertune.interleaving.interleaver import Interleaver
from ciphertune.outsourcing.convert import outsource, session_of
from ciphertune.plugins import registry
from ciphertune.selection import Selection
from ciphertune.worker.process import worker_process
from ciphertune.workloads.base import base_of
from ciphertune.workloads.named import load_workload

HERE = Path(__file__).parent
TOKENS = {"smollm2": (512, 1024), "mlp": (2048,)}
WAYS = {"whole": (1, 1), "one after the other": (2, 1), "interleaved": (2, 2)}
"""Micro-batches, and how many of them at once."""
PHASES = ("encrypt_seconds", "wait_seconds", "evaluate_seconds", "decrypt_seconds", "turn_seconds")


def client(model_name: str, to: str, tokens: int, repeat: int) -> dict[str, Any]:
    """Seconds of forward and backward passes over one batch, by way; the first round of all is not counted."""
    work = load_workload(model_name, batches=1, tokens=tokens, held_out=1, seed=0)
    model = outsource(work.model, to)
    model.train()
    session = session_of(model)

    def part_of_step(part: Any, count: int) -> None:
        loss = model(**part).loss if work.loss_fn is None else work.loss_fn(model(part[0]), part[1])
        (loss / count).backward()

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    phases: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with Interleaver(1) as one, Interleaver(2) as two:
        for number in range(repeat + 1):
            for way, (count, at_once) in WAYS.items():
                before = copy.copy(session.traffic)
                begin = time.perf_counter()
                tasks = [functools.partial(part_of_step, part, count) for part in cut_batch(work.train[0], count)]
                (one if at_once == 1 else two).run(tasks)
                took = time.perf_counter() - begin
                model.zero_grad()
                if number:
                    seconds[way].append(took)
                    spent = session.traffic.since(before)
                    phases[way].append({name: getattr(spent, name) for name in PHASES})
    session.close()
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "step_s": medians,
        "interleaved_to_one_after_the_other": medians["interleaved"] / medians["one after the other"],
        "interleaved_to_whole": medians["interleaved"] / medians["whole"],
        "phases_s": {
            way: {name: statistics.median(row[name] for row in rows) for name in PHASES} for way, rows in phases.items()
        },
        "all_s": seconds,
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def on_cores(cores: set[int] | None) -> Iterator[None]:
    """What is started within runs on these cores alone."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def workers(model: str, count: int, pinned: bool) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Workers that hold rows of every layer each: their addresses, and the options to reach them."""
    transport = registry.load(registry.TRANSPORTS, "zmq")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        here = transport.loopback(folder, {})
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if pinned else threads)  # the mlp's weights are trained, here as in the client
        split(base_of(model), folder / "bundle", workers=count, placement="rows")
        torch.set_num_threads(threads)
        parts = sorted((folder / "bundle").glob("worker*"))
        with on_cores({1} if pinned else None):
            started = [stack.enter_context(worker_process(part, "zmq", here.address, here.serve)) for part in parts]
        yield [address for address, _ in started], dict(here.connect)


@contextlib.contextmanager
def cluster(model: str, count: int, pinned: bool) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The same on a Ray cluster, behind its head's Ray Client server, so that there is one link to delay."""
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = {"num_cpus": count, "include_dashboard": False, "ray_client_server_port": port}
    with tempfile.TemporaryDirectory() as folder:
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if pinned else threads)
        split(base_of(model), f"{folder}/bundle", workers=count, placement="rows")
        torch.set_num_threads(threads)
        with on_cores({1} if pinned else None):
            made = Cluster(initialize_head=True, head_node_args=head)
            up = ["ray", "up", f"{folder}/bundle", "--workers", str(count), "--address", f"gcs://{made.address}"]
            subprocess.run([sys.executable, "-m", "ciphertune", *up], stdout=subprocess.DEVNULL, check=True)
        try:
            yield [f"127.0.0.1:{port}"], {}
        finally:
            made.shutdown()


def in_child(request: dict[str, Any], pinned: bool) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps(request)]
    with on_cores({0} if pinned else None):
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def measure(models: list[str], latencies: list[float], counts: list[int], pins: list[bool], over: str) -> Any:
    serve = cluster if over == "ray" else workers
    for model, pinned in itertools.product(models, pins):
        sizes = TOKENS[model]
        for tokens in sizes if 0 in counts else ():
            yield {"model": model, "tokens": tokens, "workers": 0, "latency_s": 0.0, "pinned": pinned}, "mlwe"
        for count in filter(None, counts):
            with serve(model, count, pinned) as (addresses, options):
                for latency, tokens in itertools.product(latencies, sizes):
                    with contextlib.ExitStack() as stack:
                        ends = tuple(stack.enter_context(shaped(address, latency)) for address in addresses)
                        row = {
                            "model": model,
                            "tokens": tokens,
                            "workers": count,
                            "over": over,
                            "latency_s": latency,
                            "pinned": pinned,
                        }
                        yield row, str(Selection("mlwe", over, ends, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(TOKENS), default=list(TOKENS))
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.0, 0.005], help="seconds each way")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: embedded in the client")
    parser.add_argument("--over", choices=("zmq", "ray"), default="zmq")
    parser.add_argument("--pinned", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--tokens", type=int, nargs="+", help="of every model, in place of what is set for each")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians are given")
    parser.add_argument("--json", type=Path, default=HERE / "overlap.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(client(**json.loads(arguments.child))))
        return
    if arguments.tokens:
        TOKENS.update(dict.fromkeys(TOKENS, tuple(arguments.tokens)))
    load = os.getloadavg()[0]
    if "smollm2" in arguments.models:
        try:
            load_workload("smollm2", batches=1, tokens=2, held_out=1)
        except ConfigError as error:
            print(f"without SmolLM2: {error}")
            arguments.models.remove("smollm2")
    pins = {"yes": [True], "no": [False], "both": [True, False]}[arguments.pinned]
    rows = []
    for row, to in measure(arguments.models, arguments.latencies, arguments.workers, pins, arguments.over):
        request = {"model_name": row["model"], "to": to, "tokens": row["tokens"], "repeat": arguments.repeat}
        rows.append({**row, **in_child(request, row["pinned"])})
        found = rows[-1]
        print(
            f"{row['model']} {row['tokens']}, {row['workers'] or 'embedded'} worker(s), {1e3 * row['latency_s']:g} ms"
            f"{', pinned' * row['pinned']}: "
            + ", ".join(f"{way} {value:.3f} s" for way, value in found["step_s"].items())
            + f"; {found['interleaved_to_one_after_the_other']:.2f}, {found['interleaved_to_whole']:.2f}",
            flush=True,
        )
    result = {"machine": machine(load), "repeat": arguments.repeat, "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
