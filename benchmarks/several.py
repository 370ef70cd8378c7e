"""More workers against what ``ciphertune plan`` says of them, on one machine: each as a slow machine of its own.

``python benchmarks/several.py`` takes some six minutes on a quiet machine of two cores or more. The client has one
core. The workers are on another one, and an evaluation takes each of them as long as if it had a tenth of a core
(``slow_worker.py``): so four leave the core idle for half of the time, and are as four slow machines are. The core is
measured by itself, and the plan counts a tenth of its speed. Messages are not slower, and the workers take turns at
them, which is planned so.

``several.json`` beside this file is written after every case; ``--only`` measures some of them again and keeps the
others, and without a number plans what is there anew. Then ``python docs/generate.py`` makes the table.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from predict import CORES, LOOPBACK, TO, Case, environment, on
from sweep import machine

import ciphertune
from ciphertune.bench.train import run_child
from ciphertune.planning.plan import Plan, make_plan
from ciphertune.planning.speeds import Speeds, read_speeds
from ciphertune_zmq import ZmqTransport

HERE = Path(__file__).parent
CASES = (Case(1, "layers", "0ms", 0), *(Case(n, p, "0ms", 0) for n in (2, 4) for p in ("layers", "rows")))


def measured(tokens: int) -> Speeds:
    """Speeds of a core, and what the transport costs between two."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "speeds.json"
        command = [sys.executable, "-m", "ciphertune", "plan", "smollm2", "--to", TO, "--json"]
        command += ["--tokens", str(tokens), "--workers", "4", "--placement", "rows", "--save-speeds", str(path)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment(True))
        return read_speeds(path)


def slowed(speeds: Speeds, share: float) -> Speeds:
    """Speeds of a machine whose processor has a share of the speed."""
    products = (dataclasses.replace(each, evaluate=each.evaluate / share) for each in speeds.products)
    return dataclasses.replace(speeds, products=tuple(products))


@contextlib.contextmanager
def slow_worker(folder: Path, bind: str, serve: dict[str, str], share: float) -> Iterator[str]:
    """A worker with a share of the last core: its address."""
    command = [sys.executable, str(HERE / "slow_worker.py"), str(share), str(folder), "--bind", bind, "--threads", "1"]
    command += ["--backends", "all"]
    for name, value in serve.items():
        command += ["--option", f"{name}={value}"]
    with on(CORES[-1]):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        first = next((line for line in process.stdout if line.startswith("ready ")), "")
        if not first:
            raise SystemExit("a worker did not start")
        yield first.split()[1]
    finally:
        process.terminate()
        process.wait()


def run(case: Case, bundle: Path, keys: Path, cache: Path, steps: int, share: float) -> dict[str, Any]:
    """A training: seconds of its steps, and what the client counted in the last."""
    here = ZmqTransport.loopback(keys, {})
    with contextlib.ExitStack() as stack:
        addresses = [
            stack.enter_context(slow_worker(folder, here.address, dict(here.serve), share))
            for folder in sorted(bundle.glob("worker*"))
        ]
        options = "&".join(f"{name}={value}" for name, value in {**here.connect, "timeout": "600"}.items())
        request: dict[str, Any] = {"model_name": "smollm2", "to": f"{TO}{','.join(addresses)}?{options}"}
        request |= {"tokens": case.tokens, "count": steps + 1, "seed": 0}
        with on(CORES[0]):
            return run_child(request, str(cache))


def planned(case: Case, speeds: Speeds, share: float) -> Plan:
    return make_plan(
        "smollm2",
        TO,
        tokens=case.tokens,
        bandwidth=LOOPBACK,
        latency=0.0,
        workers=case.workers,
        placement=case.placement,
        processors="shared for messages",
        client=speeds,
        worker=slowed(speeds, share),
    )


def measure(case: Case, cache: Path, steps: int, share: float) -> dict[str, Any]:
    """A row: a case, measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ciphertune.split("smollm2", folder / "bundle", workers=case.workers, placement=case.placement)
        found = run(case, folder / "bundle", folder, cache, steps, share)
    phases = {name: value for name, value in found["traffic"][-1].items() if name.endswith("_seconds")}
    real = statistics.median(found["seconds"][1:])
    return {**dataclasses.asdict(case), "measured_s": real, "all_seconds": found["seconds"], "phases": phases}


def beside(row: dict[str, Any], case: Case, speeds: Speeds, share: float) -> dict[str, Any]:
    """A row with what is planned."""
    estimate = planned(case, speeds, share).estimate
    assert estimate is not None
    parts = {name: getattr(estimate, name) for name in ("encrypt", "evaluate", "decrypt", "network", "rest")}
    told = {"predicted_s": estimate.total, "error": estimate.total / row["measured_s"] - 1}
    return {**row, **told, "limit": estimate.bottleneck, "predicted_phases": parts}


def kept(path: Path, same: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings wrote; nothing where there was none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if all(found.get(name) == value for name, value in same.items()) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1, help="of a core, for each worker")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="that are timed, after one that is not")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0; others are kept")
    parser.add_argument("--json", type=Path, default=HERE / "several.json")
    arguments = parser.parse_args()
    same = {"share": arguments.share, "tokens": arguments.tokens, "steps": arguments.steps}
    old = kept(arguments.json, same)
    where = machine(os.getloadavg()[0]) if arguments.only != [] or not old else old["machine"]
    chosen = [dataclasses.replace(case, tokens=arguments.tokens) for case in CASES]
    names = [(case.workers, case.placement) for case in chosen]
    rows = {(row["workers"], row["placement"]): row for row in old.get("rows", [])}
    speeds = measured(arguments.tokens)
    with tempfile.TemporaryDirectory() as cache:  # what encryption prepares of the model, once

        def write() -> None:
            """Plan all that was measured with the speeds of this run."""
            for case, name in zip(chosen, names, strict=True):
                if name in rows:
                    rows[name] = beside(rows[name], case, speeds, arguments.share)
            found = {"machine": where, **same, "rows": [rows[name] for name in names if name in rows]}
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

        for number in arguments.only if arguments.only is not None else range(len(CASES)):
            rows[names[number]] = measure(chosen[number], Path(cache), arguments.steps, arguments.share)
            write()
        write()
    for row in rows.values():
        told = f"planned {row['predicted_s']:.2f} s ({row['error']:+.0%})"
        print(f"{row['workers']} by {row['placement']}: {row['measured_s']:.2f} s, {told}")


if __name__ == "__main__":
    main()
