"""Many clients fill one worker for a while: ``make soak``, or ``python tests/long/soak.py --minutes 10 --clients 32``.

Each has a model of its own, and a key. Its products are held against its weights, forward and backward, then the same
requests are sent again many times, and each answer held against the first bit for bit: what a client computes itself
takes little, so that the worker always has requests of all clients. The worker has a core, and the clients the others.
Ends with status 1 if a result was wrong, a client's share was less than 0.9 of another's, or the worker's memory grew
after its warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import _helpers  # noqa: F401
import remote
import torch
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune._support.processor import processor_seconds
from ciphertune.bench.compare import machine as described
from ciphertune.plugins import registry
from ciphertune.protocol import Message

CORES = sorted(os.sched_getaffinity(0))
PROCESSES = 4
FEATURES = (512, 1024, 64)
TOKENS = 64
AGAIN = 50
"""How often the requests of a step are sent again."""
GROWTH = 40e6
WARM_UP = 0.25
SHARE = 0.9

_MAKING = threading.Lock()


def network(number: int) -> nn.Sequential:
    """The same one at every call; the seed is the process's, so threads take turns."""
    with _MAKING:
        torch.manual_seed(number)
        first, middle, last = FEATURES
        return nn.Sequential(nn.Linear(first, middle), nn.ReLU(), nn.Linear(middle, last))


class Recorded:
    """The requests for products that a session sends over a link, and their answers, until they are taken."""

    def __init__(self, session: Any) -> None:
        (worker,) = session.pool.workers
        self._link, self._submit = worker.link, worker.link.submit
        self._seen: list[tuple[Message, Future[Message]]] = []
        worker.link.submit = self._recording

    def take(self) -> list[tuple[Message, Message]]:
        seen, self._seen = self._seen, []
        return [(request, reply.result(60)) for request, reply in seen]

    def again(self, request: Message) -> Message:
        answer: Message = self._submit(request).result(60)
        return answer

    def _recording(self, request: Message) -> Future[Message]:
        future: Future[Message] = self._submit(request)
        if request.kind == "evaluate":
            buffers = {name: buffer.clone() for name, buffer in request.buffers.items()}
            kept = Message("evaluate", dict(request.fields), buffers, version=request.version)
            kept.reply_bytes = request.reply_bytes
            self._seen.append((kept, future))
        return future


class Client:
    """A client of its own model.

    Args:
        address: of the worker.
        keys: folder of keys.
        number: of the client.
        models: how many there are; more clients share them.
    """

    def __init__(self, address: str, keys: str, number: int, models: int) -> None:
        to = f"mlwe+zmq://{address}?curve={keys}&client=client{number}"
        self._here = ciphertune.outsource(network(number % models), "clear?weight_bits=8")
        self._there = ciphertune.outsource(network(number % models), to)
        self._recorded = Recorded(session_of(self._there))
        self._generator = torch.Generator().manual_seed(number)
        self.products = self.wrong = 0
        self._asked = self._step()

    def run(self, begin: float, end: float) -> None:
        """Ask until ``end``; what is answered from ``begin`` on counts."""
        while time.time() < end:
            for _ in range(AGAIN):
                for request, first in self._asked:
                    reply = self._recorded.again(request)
                    same = reply.buffers.keys() == first.buffers.keys() and all(
                        torch.equal(buffer, first.buffers[name]) for name, buffer in reply.buffers.items()
                    )
                    self.wrong += not same or reply.kind != "ok"
                    self.products += begin <= time.time() < end
                if time.time() >= end:
                    break
            else:
                self._asked = self._step()
        session_of(self._there).close()

    def _step(self) -> list[tuple[Message, Message]]:
        """A step under encryption, held against one that is evaluated here; its requests and answers."""
        x = torch.randn(TOKENS, FEATURES[0], generator=self._generator)
        outputs = []
        for model in (self._here, self._there):
            mine = x.clone().requires_grad_()
            y = model(mine)
            y.square().sum().backward()
            assert mine.grad is not None
            outputs.append((y.detach(), mine.grad))
        for a, b in zip(*outputs, strict=True):
            # A value near zero may fall on the other side of the ReLU, which gradients show.
            self.wrong += float((a - b).norm() / a.norm()) > 0.1
        return self._recorded.take()


def clients(address: str, keys: str, numbers: list[int], models: int) -> None:
    """Several clients in this process: tells when they are ready, reads when to begin and end, prints what each got."""
    os.sched_setaffinity(0, CORES[:-1] or CORES)
    torch.set_num_threads(1)
    made = [Client(address, keys, number, models) for number in numbers]
    print("ready", flush=True)
    begin, end = json.loads(sys.stdin.readline())
    threads = [threading.Thread(target=each.run, args=(begin, end)) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([[each.products, each.wrong] for each in made]))


def give_core(pid: int) -> None:
    """Have a process with all its threads run on the last core alone."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), CORES[-1:])


def resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--models", type=int, help="as many as clients if not given")
    parser.add_argument("--evaluators", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    count, models = arguments.clients, arguments.models or arguments.clients
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keys = str(Path(folder) / "keys")
        names = [f"client{number}" for number in range(count)]
        registry.load(registry.TRANSPORTS, "zmq").make_keys(Path(keys), names, worker=True)
        for number in range(models):
            ciphertune.split(network(number), Path(folder) / f"bundle{number}")
        bundles = json.dumps([f"bundle{number}/worker" for number in range(models)])
        file = Path(folder) / "worker.toml"
        file.write_text(
            f"bundles = {bundles}\nthreads = 1\nevaluators = {arguments.evaluators}\n"
            '[[bind]]\naddress = "tcp://127.0.0.1:*"\ncurve = "keys"\n[log]\nlevel = "warning"\n'
        )
        worker = stack.enter_context(remote.worker_of(file))
        give_core(worker.process.pid)
        children = []
        for part in range(min(PROCESSES, count)):
            code = "import sys, json, soak; soak.clients(*json.loads(sys.argv[1]))"
            request = json.dumps([worker.address, keys, list(range(count))[part::PROCESSES], models])
            child = subprocess.Popen(
                [sys.executable, "-c", code, request],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent,
            )
            stack.callback(child.wait)
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", "a client did not start"
        begin = time.time() + 2
        end = begin + 60 * arguments.minutes
        for child in children:
            assert child.stdin is not None
            child.stdin.write(json.dumps([begin, end]) + "\n")
            child.stdin.flush()
        memory = []
        time.sleep(max(0.0, begin - time.time()))
        used = processor_seconds(worker.process.pid) or 0.0
        while time.time() < end:
            time.sleep(min(1.0, 0.6 * arguments.minutes))
            memory.append(resident(worker.process.pid))
        used = ((processor_seconds(worker.process.pid) or 0.0) - used) / (time.time() - begin)
        got: list[list[int]] = []
        for child in children:
            output, _ = child.communicate(timeout=120)
            got += json.loads(output.splitlines()[-1])
    products = [answered for answered, _ in got]
    wrong = sum(each for _, each in got)
    warm = memory[int(len(memory) * WARM_UP) :]
    half = len(warm) // 2
    early, late = (sorted(part)[len(part) // 2] for part in (warm[:half], warm[half:]))
    least, most = min(products), max(products)
    print(f"{count} clients, {models} models, {arguments.minutes:g} minutes, {sum(products)} products, {wrong} wrong")
    print(f"{sum(products) / 60 / arguments.minutes:.0f} products a second; of a client {least} to {most}")
    print(f"the worker computed for {used:.0%} of the time")
    print(f"worker's own memory after warm-up, medians of both halves: {early / 1e6:.1f} MB, {late / 1e6:.1f} MB")
    if arguments.json is not None:
        asked = {"minutes": arguments.minutes, "clients": count, "models": models, "evaluators": arguments.evaluators}
        made = {"products": products, "wrong": wrong, "busy": used, "memory": [early, late]}
        found = {"machine": {**described(), "load_before": round(load, 1)}, **asked, **made}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    fair = least >= SHARE * most
    flat = late - early < GROWTH
    print("results", "WRONG" if wrong else "right")
    print("shares", "fair" if fair else "UNFAIR")
    print("memory", "flat" if flat else "GROWING")
    return 0 if not wrong and fair and flat and len(got) == count else 1


if __name__ == "__main__":
    sys.exit(main())
