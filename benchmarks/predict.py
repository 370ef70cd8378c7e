"""Seconds a training step as ``ciphertune plan`` predicts them: held against runs, and for large models.

``python benchmarks/predict.py validate`` trains SmolLM2 with workers over zmq and compares, some 30 minutes on a quiet
machine of two cores or more. The client has one core and the workers another, a thread each, so that they are as two
machines are; several workers share their core, and are predicted so. ``--no-pin`` lets all of them use all cores, in
turn. Speeds are measured before and after every run; where the two predictions differ, the machine was busy with
something else, and the run says little.

``python benchmarks/predict.py table`` measures this machine for a minute and predicts steps of large models whose
client and workers are each as fast. Each writes its part of ``predict.json`` beside this file; then
``python docs/generate.py`` makes tables and plot.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sweep import machine

import ciphertune
from ciphertune.bench.train import run_child
from ciphertune.bundle.placement import Placement, placements
from ciphertune.planning.estimate import estimate_step
from ciphertune.planning.placing import NEAR
from ciphertune.planning.plan import Plan, bytes_per_second, make_plan, seconds
from ciphertune.planning.products import PlannedModel, Products
from ciphertune.planning.simulation import Network
from ciphertune.planning.speeds import Speeds, read_speeds
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

HERE = Path(__file__).parent
LOOPBACK = 1e12
"""Bytes a second: what limits a link in this machine is the transport, which is measured."""
CORES = sorted(os.sched_getaffinity(0))
TO = "mlwe+zmq://"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run and its prediction; times are one way."""

    workers: int
    placement: str
    latency: str
    tokens: int
    micro_batches: int = 1
    interleave: int = 1


def cases(tokens: Sequence[int], latencies: Sequence[str], interleaved: bool) -> list[Case]:
    placed: tuple[tuple[int, str], ...] = ((1, "layers"), (2, "layers"), (2, "rows"))
    found = [Case(w, p, latency, t) for t, latency, (w, p) in itertools.product(tokens, latencies, placed)]
    if interleaved:
        found += [dataclasses.replace(case, micro_batches=2, interleave=i) for case in found for i in (1, 2)]
    return found


def measured_speeds(case: Case, pin: bool) -> Speeds:
    """In a process of its own, with as many threads as the run will have."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speeds.json"
        command = [sys.executable, "-m", "ciphertune", "plan", "smollm2", "--to", TO, "--json"]
        command += ["--tokens", str(case.tokens), "--workers", str(case.workers), "--placement", case.placement]
        command += ["--micro-batches", str(case.micro_batches), "--save-speeds", str(path)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment(pin))
        return read_speeds(path)


def environment(pin: bool) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"} if pin else dict(os.environ)


@contextlib.contextmanager
def on(core: int | None) -> Iterator[None]:
    """Start processes on one core. Whatever the caller does meanwhile is done there as well."""
    before, threads = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    if core is not None:
        os.sched_setaffinity(0, {core})
        os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def run(case: Case, bundle: Path, keys: Path, steps: int, pin: bool) -> dict[str, Any]:
    """Train, with workers and slow links started for it; of the last step what it sent."""
    from shaped import shaped

    here = ZmqTransport.loopback(keys, {})
    folders = sorted(bundle.glob("worker*"))
    with contextlib.ExitStack() as stack:
        addresses = []
        for folder in folders:
            with on(CORES[1] if pin else None):
                process = worker_process(folder, "zmq", here.address, here.serve, ("--threads", "1") if pin else ())
                address, _ = stack.enter_context(process)
            if seconds(case.latency):
                address = stack.enter_context(shaped(address, seconds(case.latency)))
            addresses.append(address)
        options = "&".join(f"{name}={value}" for name, value in {**here.connect, "timeout": "600"}.items())
        request: dict[str, Any] = {"model_name": "smollm2", "to": f"{TO}{','.join(addresses)}?{options}"}
        request |= {"tokens": case.tokens, "count": steps + 1, "seed": 0}
        if case.micro_batches > 1:
            request |= {"micro_batches": case.micro_batches, "interleave": case.interleave}
        with on(CORES[0] if pin else None):
            found = run_child(request, str(keys / "cache"))
    traffic = found["traffic"][-1]
    return {
        "seconds": statistics.median(found["seconds"][1:]),
        "all_seconds": [round(s, 3) for s in found["seconds"]],
        "phases": {name: value for name, value in traffic.items() if name.endswith("_seconds")},
        "requests": traffic["requests"],
        "bytes": traffic["bytes_up"] + traffic["bytes_down"],
    }


PARTS = ("encrypt", "evaluate", "decrypt", "network", "rest", "path")


def planned(case: Case, speeds: Speeds, pin: bool) -> Plan:
    return make_plan(
        "smollm2",
        TO,
        tokens=case.tokens,
        bandwidth=LOOPBACK,
        latency=seconds(case.latency),
        workers=case.workers,
        placement=case.placement,
        micro_batches=case.micro_batches,
        interleave=case.interleave,
        processors="shared by workers" if pin else "one",
        client=speeds,
        worker=speeds,
    )


def validate(chosen: Sequence[Case], steps: int, pin: bool, path: Path) -> None:
    """Compare; what is known is written after every case."""
    load = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = {}
        for workers, placement in {(case.workers, case.placement) for case in chosen}:
            bundles[workers, placement] = folder / f"{placement}-{workers}"
            ciphertune.split("smollm2", bundles[workers, placement], workers=workers, placement=placement)
        for case in chosen:
            before = measured_speeds(case, pin)
            real = run(case, bundles[case.workers, case.placement], folder, steps, pin)
            plans = [planned(case, speeds, pin) for speeds in (before, measured_speeds(case, pin))]
            sent = plans[0].requests, plans[0].bytes_up + plans[0].bytes_down
            assert sent == (real["requests"], real["bytes"]), "what was sent is not what was planned"
            estimates = [plan.estimate for plan in plans if plan.estimate is not None]
            totals = [estimate.total for estimate in estimates]
            row = {
                **dataclasses.asdict(case),
                "measured_s": real["seconds"],
                "predicted_s": statistics.mean(totals),
                "predicted_before_and_after_s": totals,
                "error": statistics.mean(totals) / real["seconds"] - 1,
                "requests": real["requests"],
                "measured": {"steps": real["all_seconds"], **real["phases"]},
                "predicted": [{part: getattr(estimate, part) for part in PARTS} for estimate in estimates],
            }
            rows.append(row)
            print(
                f"{case}: measured {real['seconds']:.2f} s, predicted {totals[0]:.2f} s before and {totals[1]:.2f} s "
                f"after, {100 * row['error']:+.0f}%",
                flush=True,
            )
            keep(path, "validate", {"machine": machine(load), "pinned": pin, "steps": steps, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    validating = commands.add_parser("validate", help="predictions against runs")
    validating.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    validating.add_argument("--latency", nargs="+", default=["0ms", "5ms"], help="one way")
    validating.add_argument("--interleave", action="store_true", help="also two micro-batches, in turn and interleaved")
    validating.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    validating.add_argument("--pin", action=argparse.BooleanOptionalAction, default=True)
    validating.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    commands.add_parser("table", help="steps of large models")
    parser.add_argument("--json", type=Path, default=HERE / "predict.json")
    arguments = parser.parse_args()
    if arguments.what == "table":
        keep(arguments.json, "table", table())
        return
    chosen = cases(arguments.tokens, arguments.latency, arguments.interleave)
    chosen = [chosen[i] for i in arguments.only] if arguments.only else chosen
    validate(chosen, arguments.steps, arguments.pin, arguments.json)


MODELS = ("llama-3-8b", "llama-3-70b")
WORKERS = (1, 2, 4, 8, 16, 32, 64)
BANDWIDTHS = ("1Gbit/s", "10Gbit/s", "100Gbit/s")
TABLE_TOKENS, TABLE_LATENCY = 2048, "1ms"


def table() -> dict[str, Any]:
    load = os.getloadavg()[0]
    rows = []
    for model in MODELS:
        speeds = speeds_for(model)
        products = Products(model, TO, None, TARGETS)
        models = {placement: products.placed(placement) for n in WORKERS for placement in placements(n)}
        for workers, bandwidth in itertools.product(WORKERS, BANDWIDTHS):
            tried = [
                predicted(planned, placement, bandwidth, interleave, speeds)
                for placement, planned in models.items()
                if placement.workers == workers
                for interleave in (1, 2)
            ]
            fastest = min(row["seconds"] for row in tried)
            near = [row for row in tried if row["seconds"] <= NEAR * fastest]
            best = min(near, key=lambda row: (row["worker_bytes"], row["interleave"], row["seconds"]))
            rows.append({"model": model, **best, "tried": [{k: row[k] for k in SHORT} for row in tried]})
            print(f"{model}, {workers} workers, {bandwidth}: {best['seconds']:.1f} s, {best['placement']}", flush=True)
    return {"machine": machine(load), "tokens": TABLE_TOKENS, "latency": TABLE_LATENCY, "rows": rows}


SHORT = ("placement", "interleave", "seconds", "bottleneck")
TARGETS = ("q_proj", "v_proj")


def speeds_for(model: str) -> Speeds:
    """Of this machine, with products as one worker has them and as one of many has."""
    whole = make_plan(model, TO, tokens=TABLE_TOKENS).speeds
    cut = make_plan(model, "mlwe", tokens=TABLE_TOKENS, workers=32, placement="rows", client=whole).speeds
    assert whole is not None
    assert cut is not None
    return dataclasses.replace(whole, products=whole.products + cut.products)


def predicted(
    planned: PlannedModel, placement: Placement, bandwidth: str, interleave: int, speeds: Speeds
) -> dict[str, Any]:
    sizes = [TABLE_TOKENS // interleave] * interleave
    network = Network(bytes_per_second(bandwidth), seconds(TABLE_LATENCY))
    backend = planned.choice.backend
    found = estimate_step(planned.groups, backend, sizes, interleave, placement.workers, network, speeds, speeds)
    return {
        "workers": placement.workers,
        "bandwidth": bandwidth,
        "placement": str(placement),
        "interleave": interleave,
        "seconds": found.total,
        "bottleneck": found.bottleneck,
        "path": found.path,
        "busy": found.busy,
        "worker_bytes": planned.worker_bytes,
    }


def keep(path: Path, part: str, found: dict[str, Any]) -> None:
    """Replace one part of the file."""
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**whole, part: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
