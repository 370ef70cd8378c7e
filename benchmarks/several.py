"""More workers against what ``ciphertune plan`` says of them, on one machine: each has a share of a core of its own.

``python benchmarks/several.py`` needs root on Linux with control groups, and takes some ten minutes on a quiet machine
of two cores or more. The client has one core. Each worker may use a fifth of another one, as the scheduler's quota
grants it, so that four are as four slow machines are. Their speeds, and what the transport costs with such a worker,
are measured under the same quota. It writes ``several.json`` beside this file; then ``python docs/generate.py`` makes
the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from predict import CORES, LOOPBACK, TO, Case, on
from sweep import machine

import ciphertune
from ciphertune.bench.train import run_child
from ciphertune.planning.plan import make_plan
from ciphertune.planning.speeds import Speeds, read_speeds
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

HERE = Path(__file__).parent
CASES = (Case(1, "layers", "0ms", 0), *(Case(n, p, "0ms", 0) for n in (2, 4) for p in ("layers", "rows")))
_PERIOD = 5000
"""Microseconds in which a worker gets its share: short beside a product."""


@contextlib.contextmanager
def group(share: float) -> Iterator[Path]:
    """A control group whose processes get a share of one core together: the file that takes their ids.

    Raises:
        SystemExit: there are no control groups that this process may make.
    """
    name, quota = f"ciphertune-{os.getpid()}-{time.monotonic_ns()}", int(share * _PERIOD)
    old, new = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    folder = (old if old.is_dir() else new) / name
    try:
        folder.mkdir()
        if old.is_dir():
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (folder / "cpu.max").write_text(f"{quota} {_PERIOD}")
    except OSError as error:
        raise SystemExit(f"no control group for processors can be made here ({error}): run it as root") from None
    try:
        yield folder / "cgroup.procs"
    finally:
        end = time.monotonic() + 10
        while folder.exists() and time.monotonic() < end:
            time.sleep(0.1)
            with contextlib.suppress(OSError):  # until the last process has gone
                folder.rmdir()


def limit(pid: int, to: Path) -> None:
    """Put a process with all its threads into a group."""
    to.write_text(str(pid))


def plan_command(tokens: int, path: Path) -> list[str]:
    command = [sys.executable, "-m", "ciphertune", "plan", "smollm2", "--to", TO, "--json", "--save-speeds", str(path)]
    return [*command, "--tokens", str(tokens), "--workers", "4", "--placement", "rows"]


def measured(tokens: int, share: float | None, workers_alone: bool) -> Speeds:
    """Speeds of a core, or of a share of one; with ``workers_alone`` only what the process starts is limited."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        path = Path(name) / "speeds.json"
        procs = None if share is None else stack.enter_context(group(share))
        process = subprocess.Popen(
            plan_command(tokens, path), stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        done = threading.Event()
        if procs is not None:
            if workers_alone:
                watching = threading.Thread(target=limit_children, args=(process.pid, procs, done))
                watching.start()
                stack.callback(watching.join)
                stack.callback(done.set)
            else:
                limit(process.pid, procs)
        if process.wait() != 0:
            raise SystemExit("the speeds could not be measured")
        return read_speeds(path)


def limit_children(pid: int, to: Path, done: threading.Event) -> None:
    """Put the processes that a process starts into a group, as they come."""
    known: set[int] = set()
    while not done.wait(0.05):
        with contextlib.suppress(OSError):
            found = {int(each) for task in Path(f"/proc/{pid}/task").glob("*/children") for each in read_ids(task)}
            for each in found - known:
                limit(each, to)
            known |= found


def read_ids(path: Path) -> list[str]:
    return path.read_text().split()


def run(case: Case, bundle: Path, keys: Path, steps: int, share: float) -> list[float]:
    """Seconds of the steps of a training."""
    here = ZmqTransport.loopback(keys, {})
    with contextlib.ExitStack() as stack:
        addresses = []
        for folder in sorted(bundle.glob("worker*")):
            procs = stack.enter_context(group(share))
            with on(CORES[-1]):
                process = worker_process(folder, "zmq", here.address, here.serve, ("--threads", "1"))
                address, pid = stack.enter_context(process)
            limit(pid, procs)
            addresses.append(address)
        options = "&".join(f"{name}={value}" for name, value in {**here.connect, "timeout": "600"}.items())
        request: dict[str, Any] = {"model_name": "smollm2", "to": f"{TO}{','.join(addresses)}?{options}"}
        request |= {"tokens": case.tokens, "count": steps + 1, "seed": 0}
        with on(CORES[0]):
            found = run_child(request, str(keys / "cache"))
    return list(found["seconds"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    client = measured(arguments.tokens, None, False)
    worker = measured(arguments.tokens, arguments.share, False)
    between = measured(arguments.tokens, arguments.share, True)
    client = dataclasses.replace(client, link=between.link)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for number in arguments.only or range(len(CASES)):
            case = dataclasses.replace(CASES[number], tokens=arguments.tokens)
            bundle = Path(name) / f"{case.placement}-{case.workers}"
            ciphertune.split("smollm2", bundle, workers=case.workers, placement=case.placement)
            seconds = run(case, bundle, Path(name), arguments.steps, arguments.share)
            real = statistics.median(seconds[1:])
            planned = make_plan(
                "smollm2",
                TO,
                tokens=case.tokens,
                bandwidth=LOOPBACK,
                latency=0.0,
                workers=case.workers,
                placement=case.placement,
                client=client,
                worker=worker,
            )
            assert planned.estimate is not None
            told = planned.estimate.total
            row = {**dataclasses.asdict(case), "measured_s": real, "predicted_s": told, "error": told / real - 1}
            rows.append({**row, "all_seconds": seconds, "limit": planned.estimate.bottleneck})
            told_of = f"{case.workers} by {case.placement}: {real:.2f} s, planned {told:.2f} s ({row['error']:+.0%})"
            print(told_of, flush=True)
    return {"machine": machine(load), "share": arguments.share, "steps": arguments.steps, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.2, help="of a core, for each worker")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    parser.add_argument("--json", type=Path, default=HERE / "several.json")
    arguments = parser.parse_args()
    arguments.json.write_text(json.dumps(measure(arguments), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
