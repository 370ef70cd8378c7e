"""Small requests beside big ones at one worker: ``python tests/long/load.py --seconds 20 --evaluators 2``.

Measures the time of products of one token at an idle worker, and again while other clients ask for products of many.
Prints a JSON object: percentiles in milliseconds, and how many times as long as idle the slow ones take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _helpers  # noqa: F401
import remote
import torch
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune.plugins import registry

FEATURES = 1024


def network() -> nn.Sequential:
    """The same one in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES))


def ask(address: str, keys: str, name: str, tokens: int, seconds: float) -> list[float]:
    """Products for so long; milliseconds of each."""
    torch.set_num_threads(1)
    model = ciphertune.outsource(network(), f"mlwe+zmq://{address}?curve={keys}&client={name}", layers="all")
    x = torch.randn(tokens, FEATURES)
    times = []
    with torch.no_grad():
        model(x)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.perf_counter()
            model(x)
            times.append(1000 * (time.perf_counter() - begun))
    session_of(model).close()
    return times


def percentile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=2, help="with big requests")
    parser.add_argument("--tokens", type=int, default=512, help="of a big request")
    parser.add_argument("--evaluators", type=int, default=1)
    arguments = parser.parse_args()
    names = ["small", *(f"big{number}" for number in range(arguments.clients))]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keys = str(Path(folder) / "keys")
        registry.load(registry.TRANSPORTS, "zmq").make_keys(Path(keys), names, worker=True)
        ciphertune.split(network(), Path(folder) / "bundle", layers="all")
        options = ("--curve", keys, "--evaluators", str(arguments.evaluators))
        worker = stack.enter_context(remote.worker(Path(folder) / "bundle" / "worker", *options))
        idle = ask(worker.address, keys, "small", 1, arguments.seconds)
        for name in names[1:]:
            code = "import sys, json, load; load.ask(*json.loads(sys.argv[1]))"
            request = json.dumps([worker.address, keys, name, arguments.tokens, 2 * arguments.seconds + 60])
            child = subprocess.Popen([sys.executable, "-c", code, request], cwd=Path(__file__).parent)
            stack.callback(child.wait)
            stack.callback(child.kill)
        time.sleep(15)  # until they have prepared themselves
        busy = ask(worker.address, keys, "small", 1, arguments.seconds)
    slow = {share: (percentile(idle, share), percentile(busy, share)) for share in (0.5, 0.99)}
    found = {
        f"p{100 * share:g}_{of}": times[i] for share, times in slow.items() for i, of in enumerate(("idle", "busy"))
    }
    found["p99_ratio"] = round(slow[0.99][1] / slow[0.99][0], 1)
    sys.stdout.write(json.dumps({**vars(arguments), **found}) + "\n")


if __name__ == "__main__":
    main()
