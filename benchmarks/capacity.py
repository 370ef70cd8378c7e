"""Many clients at one worker as ``ciphertune plan --clients`` simulates them, held against runs on this machine.

``python benchmarks/capacity.py`` takes some three minutes on a quiet machine of two cores or more. The worker has a
core, and the clients share another. A client replays a recorded request over a connection and a session of its own,
pauses, and does so again: what it would compute for itself takes no time, so that many fit one core. Seconds of an
evaluation, of a round trip, and of both cores for one are measured with one client, which pauses as well. It writes
``capacity.json`` beside this file; then ``python docs/generate.py`` makes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from predict import CORES, on
from sweep import machine
from torch import nn

import ciphertune
from ciphertune._support.processor import processor_seconds
from ciphertune.client.choice import choose
from ciphertune.client.connection import WorkerConnection
from ciphertune.planning.capacity import with_transport
from ciphertune.planning.queueing import Kind, Lines, Pass, simulate_clients
from ciphertune.planning.simulation import MicroBatch, Product, Request
from ciphertune.protocol import Message
from ciphertune.transport import Link
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

HERE = Path(__file__).parent
FEATURES, TOKENS = (576, 1536), 256
"""Of SmolLM2's widest products, and a micro-batch."""
WARM_UP = 0.5
MANY = ("--max-sessions", "1000", "--max-requests", "1000", "--threads", "1")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int, nn.Sequential]]:
    """A worker on a core of its own: the selection string, its process id, and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*FEATURES, bias=False))
    ciphertune.split(model, folder / "bundle")
    here = ZmqTransport.loopback(folder, {})
    with contextlib.ExitStack() as stack:
        with on(CORES[-1]):  # which is left before clients begin
            process = worker_process(folder / "bundle" / "worker", "zmq", here.address, here.serve, MANY)
            address, pid = stack.enter_context(process)
        options = "&".join(f"{name}={value}" for name, value in here.connect.items())
        yield f"mlwe+zmq://{address}?{options}", pid, model


def record(to: str, model: nn.Sequential, tokens: int = TOKENS) -> tuple[Message, Message, float]:
    """The requests that open a session and ask for a product, and seconds of the evaluation, the median of several."""
    sent: list[Message] = []
    submit = WorkerConnection.submit

    def recording(self: WorkerConnection, request: Message, *rest: Any) -> Any:
        sent.append(request)
        return submit(self, request, *rest)

    with mock.patch.object(WorkerConnection, "submit", recording):
        features = model[0].in_features
        outsourced = ciphertune.outsource(model, to, "all")
        session = ciphertune.session_of(outsourced)
        seconds = []
        with torch.no_grad():
            for _ in range(12):
                before = session.traffic.evaluate_seconds
                outsourced(torch.randn(tokens, features))
                seconds.append(session.traffic.evaluate_seconds - before)
        session.close()
    opened, product = (next(m for m in sent if m.kind == kind) for kind in ("open", "evaluate"))
    return opened, product, statistics.median(seconds[2:])


class Replaying:
    """A client that repeats requests."""

    def __init__(self, to: str, opened: Message, asked: Sequence[Message]) -> None:
        choice = choose(to)
        self._link: Link = choice.transport.connect(choice.selection.endpoints, None)[0]
        session = self._answer(opened).fields["session"]
        self._asked = [Message("evaluate", {**each.fields, "session": session}, each.buffers) for each in asked]
        self.done: list[tuple[float, float]] = []
        """When each was answered, and the seconds until then."""

    def run(self, pause: float, stop: threading.Event, seed: int) -> None:
        chance = random.Random(seed)
        while not stop.wait(chance.expovariate(1 / pause) if pause else 0.0):
            begun = time.monotonic()
            self.once()
            now = time.monotonic()
            self.done.append((now, now - begun))

    def once(self) -> None:
        """Send all requests, one after the other."""
        for request in self._asked:
            self._answer(request)

    def close(self) -> None:
        self._link.close()

    def _answer(self, request: Message) -> Message:
        reply = self._link.submit(request).result(60)
        assert reply.kind != "error", reply.fields
        return reply


def measured(
    to: str, pid: int, opened: Message, product: Message, clients: int, pause: float, seconds: float
) -> dict[str, float]:
    """Products a second of all clients, seconds of their core and the worker's for one, what one takes, median, p99."""
    everyone = [Replaying(to, opened, [product]) for _ in range(clients)]
    stop = threading.Event()
    threads = [threading.Thread(target=one.run, args=(pause, stop, i)) for i, one in enumerate(everyone)]
    for thread in threads:
        thread.start()
    # Neither the beginning counts, when all come at once, nor the end, when some have gone.
    time.sleep(2 * pause + WARM_UP)
    before = spent(pid)
    time.sleep(seconds)
    after = spent(pid)
    stop.set()
    for thread in threads:
        thread.join()
    found = sorted(took for one in everyone for end, took in one.done if before[0] <= end < after[0])
    for one in everyone:
        one.close()
    took, client, worker = (b - a for a, b in zip(before, after, strict=True))
    count = len(found)
    return {"products_per_second": count / took, "client_s": client / count, "worker_s": worker / count, **shown(found)}


def spent(pid: int) -> tuple[float, float, float]:
    """Seconds that have passed, and those that the clients and the worker have computed."""
    return time.monotonic(), time.process_time(), processor_seconds(pid) or 0.0


def shown(seconds: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "p99_s": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20, help="of each run")
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 2.0], help="of the worker, if nobody waited")
    parser.add_argument("--json", type=Path, default=HERE / "capacity.json")
    arguments = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    os.sched_setaffinity(0, {CORES[0]})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as (to, pid, model):
        opened, product, evaluate = record(to, model)
        # With pauses: caches forget between products, and cores fall asleep, as they do where clients compute.
        alone = measured(to, pid, opened, product, 1, 2 * evaluate, arguments.seconds / 2)
        overhead = max(0.0, alone["median_s"] - evaluate)
        own = min(overhead, alone["client_s"])
        print(
            f"evaluation {1000 * evaluate:.2f} ms, the rest of a round trip {1000 * overhead:.2f} ms, of it "
            f"{1000 * own:.2f} ms of the clients' core; {1000 * alone['worker_s']:.2f} ms of the worker's core"
        )
        # What a message takes beside that is the worker's time: its processor encrypts, checks and copies, a part of it
        # while the client is at work as well. Sending and receiving are alike.
        request = Request((0,), own / 2, 0, evaluate, 0, own / 2)
        request = with_transport(request, overhead - own, max(0.0, alone["worker_s"] - evaluate))
        cycle = (Pass(MicroBatch([Product(0.0, (request,))]), 1),)
        lines = Lines(1e12, 1e12, 0.0, 1e12, processors=1)
        for load in arguments.load:
            for clients in arguments.clients:
                pause = clients * (evaluate + overhead) / load
                real = measured(to, pid, opened, product, clients, pause, arguments.seconds)
                told = simulate_clients([Kind("one", clients, cycle, think=pause)], 1, lines, 20_000).kinds["one"]
                row = {
                    "clients": clients,
                    "load": load,
                    "measured": real,
                    "predicted": {
                        "products_per_second": told.tokens_per_second,
                        "median_s": told.median,
                        "p99_s": told.p99,
                    },
                }
                rows.append(row)
                off = told.tokens_per_second / real["products_per_second"] - 1
                print(
                    f"{clients} clients, load {load:g}: {real['products_per_second']:.1f} products/s measured, "
                    f"{told.tokens_per_second:.1f} predicted ({100 * off:+.0f}%); median {1000 * real['median_s']:.1f} "
                    f"and {1000 * told.median:.1f} ms, p99 {1000 * real['p99_s']:.1f} and {1000 * told.p99:.1f} ms; "
                    f"{1000 * real['worker_s']:.2f} ms of the worker's core",
                    flush=True,
                )
    found = {"machine": machine(before), "seconds": arguments.seconds, "evaluate_s": evaluate, "overhead_s": overhead}
    found |= {"client_s": own, "worker_s": alone["worker_s"], "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
