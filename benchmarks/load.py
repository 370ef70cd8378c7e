"""Small requests beside big ones at one worker: ``python benchmarks/load.py``, a minute or two on a quiet machine.

What is measured is the worker, whose clients are other machines in the field. It has a core, and all clients share
another, idle and busy alike. Clients with big requests replay one that they encrypted before, one after the other over
a connection of their own, and the system runs them when nothing else wants their core. Products of one token come at
random moments, first to the idle worker and then beside the big ones: from a client that replays, too, and from a true
one, which encrypts, decrypts and checks. The time of each is from its first byte to its result.

Prints percentiles in milliseconds, how many times as long as idle they take, and the big products a second with and
without small ones. ``--json`` writes them to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from capacity import Replaying, record
from predict import CORES, on
from sweep import machine
from torch import nn

import ciphertune
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

FEATURES = 1024
WARM = 20
"""Products before those that count."""


def network() -> nn.Sequential:
    """The same one in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False))


def big(tos: list[str], tokens: int) -> None:
    """Clients in this process: for each line that is read, so many seconds of big products, and their number."""
    torch.set_num_threads(1)
    opened, product, _ = record(tos[0], network(), tokens)
    everyone = [Replaying(to, opened, [product]) for to in tos]
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print("ready", flush=True)
    for line in sys.stdin:
        stop = threading.Event()
        threads = [threading.Thread(target=each.run, args=(0.0, stop, 0)) for each in everyone]
        for thread in threads:
            thread.start()
        time.sleep(float(line))
        stop.set()
        for thread in threads:
            thread.join()
        print(sum(len(each.done) for each in everyone), flush=True)
        for each in everyone:
            each.done.clear()


@contextlib.contextmanager
def bigs(tos: list[str], tokens: int) -> Iterator[subprocess.Popen[str]]:
    """A process with the clients that send big requests."""
    code = "import sys, json, load; load.big(*json.loads(sys.argv[1]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps([tos, tokens])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "the clients with big requests did not start"
        yield child
    finally:
        child.kill()
        child.wait()


class TrueClient:
    """A client that computes all that clients compute."""

    def __init__(self, to: str) -> None:
        self._model = ciphertune.outsource(network(), to, layers="all")
        self._x = torch.randn(1, FEATURES)

    def ask(self) -> None:
        with torch.no_grad():
            self._model(self._x)

    def close(self) -> None:
        ciphertune.session_of(self._model).close()


def timed(ask: Callable[[], object], pause: float, seconds: float) -> list[float]:
    """Milliseconds of products that are asked for at random moments."""
    chance, found = random.Random(0), []
    for _ in range(WARM):
        ask()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(chance.expovariate(1 / pause))
        begun = time.perf_counter()
        ask()
        found.append(1000 * (time.perf_counter() - begun))
    return found


def percentile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def beside(
    child: subprocess.Popen[str], seconds: float, meanwhile: Callable[[], Any] | None = None
) -> tuple[Any, float]:
    """What something gives while big requests are sent, and the big products a second."""
    assert child.stdin is not None
    assert child.stdout is not None
    # The big ones begin before it and end after it.
    child.stdin.write(f"{seconds + 1}\n")
    child.stdin.flush()
    time.sleep(0.5)
    found = None if meanwhile is None else meanwhile()
    return found, int(child.stdout.readline()) / (seconds + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="of each of the five runs")
    parser.add_argument("--clients", type=int, default=4, help="with big requests")
    parser.add_argument("--tokens", type=int, default=512, help="of a big request")
    parser.add_argument("--pause", type=float, default=0.01, help="seconds between small requests, on average")
    parser.add_argument("--evaluators", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    load, seconds, pause = os.getloadavg()[0], arguments.seconds, arguments.pause
    os.sched_setaffinity(0, {CORES[0]})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        names = ["small", *(f"big{number}" for number in range(arguments.clients))]
        ZmqTransport.make_keys(folder / "keys", names, worker=True)
        ciphertune.split(network(), folder / "bundle", layers="all")
        more = ("--threads", "1", "--evaluators", str(arguments.evaluators))
        served = (folder / "bundle" / "worker", "zmq", "127.0.0.1:*", {"curve": str(folder / "keys")}, more)
        with on(CORES[-1]):
            address, _ = stack.enter_context(worker_process(*served))
        tos = [f"mlwe+zmq://{address}?curve={folder / 'keys'}&client={each}" for each in names]
        child = stack.enter_context(bigs(tos[1:], arguments.tokens))
        opened, product, _ = record(tos[0], network(), 1)
        replaying, true = Replaying(tos[0], opened, [product]), TrueClient(tos[0])
        stack.callback(true.close)
        stack.callback(replaying.close)
        rows: dict[str, Any] = {}
        _, alone = beside(child, seconds, lambda: time.sleep(seconds))
        for kind, ask in (("replayed", replaying.once), ("true", true.ask)):
            idle = timed(ask, pause, seconds)
            busy, rate = beside(child, seconds, lambda ask=ask: timed(ask, pause, seconds))
            row = {
                f"p{100 * share:g}": [percentile(idle, share), percentile(busy, share)] for share in (0.5, 0.9, 0.99)
            }
            rows[kind] = {**row, "count": [len(idle), len(busy)], "big_per_second": rate}
            shown = "; ".join(
                f"{key} {idle:.2f} and {busy:.2f} ms, {busy / idle:.1f}×" for key, (idle, busy) in row.items()
            )
            print(f"{kind}, idle and busy: {shown}; {rate:.1f} big products/s, {alone:.1f} without", flush=True)
    if arguments.json is not None:
        asked = {key: value for key, value in vars(arguments).items() if key != "json"}
        found = {"machine": machine(load), **asked, "big_per_second_alone": alone, "small": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
