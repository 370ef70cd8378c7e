"""Many clients at one worker for a while: ``make soak``, or ``python tests/long/soak.py --minutes 10 --clients 32``.

Every product is held against the weights that the worker holds. Ends with status 1 if a result was wrong, a client got
less than half of another's share, or the worker's memory grew after its warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import remote
import torch
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune.plugins import registry

PROCESSES = 4
FEATURES = (256, 512, 64)
GROWTH = 40e6
WARM_UP = 0.25


_MAKING = threading.Lock()


def network() -> nn.Sequential:
    """The same one at every call; the seed is the process's, so threads take turns."""
    with _MAKING:
        torch.manual_seed(0)
        first, middle, last = FEATURES
        return nn.Sequential(nn.Linear(first, middle), nn.ReLU(), nn.Linear(middle, last))


def client(address: str, keys: str, name: str, end: float, found: dict[str, int]) -> None:
    """Forward and backward until ``end``, each held against a model that is evaluated here."""
    here = ciphertune.outsource(network(), "clear?weight_bits=8")
    there = ciphertune.outsource(network(), f"mlwe+zmq://{address}?curve={keys}&client={name}")
    generator = torch.Generator().manual_seed(sum(name.encode()))
    found[name] = 0
    while time.time() < end:
        x = torch.randn(16, FEATURES[0], generator=generator)
        outputs = []
        for model in (here, there):
            mine = x.clone().requires_grad_()
            y = model(mine)
            y.square().sum().backward()
            assert mine.grad is not None
            outputs.append((y.detach(), mine.grad))
        for a, b in zip(*outputs, strict=True):
            # A value near zero may fall on the other side of the ReLU, which gradients show.
            if float((a - b).norm() / a.norm()) > 0.1:
                found["wrong"] += 1
        found[name] += 1
    session_of(there).close()


def clients(address: str, keys: str, names: list[str], end: float) -> None:
    """Several clients in this process; prints what each got done."""
    torch.set_num_threads(1)
    found: dict[str, int] = {"wrong": 0}
    threads = [threading.Thread(target=client, args=(address, keys, name, end, found)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    names = [f"client{i}" for i in range(arguments.clients)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keys = str(Path(folder) / "keys")
        registry.load(registry.TRANSPORTS, "zmq").make_keys(Path(keys), names, worker=True)
        ciphertune.split(network(), Path(folder) / "bundle")
        worker = stack.enter_context(remote.worker(Path(folder) / "bundle" / "worker", "--curve", keys))
        end = time.time() + 60 * arguments.minutes + 15
        children = []
        for part in range(PROCESSES):
            code = "import sys, json, soak; soak.clients(*json.loads(sys.argv[1]))"
            request = json.dumps([worker.address, keys, names[part::PROCESSES], end])
            child = subprocess.Popen(
                [sys.executable, "-c", code, request],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent,
            )
            stack.callback(child.kill)
            children.append(child)
        memory = []
        while time.time() < end:
            time.sleep(min(1.0, 0.6 * arguments.minutes))
            memory.append(resident(worker.process.pid))
        found: dict[str, int] = {"wrong": 0}
        for child in children:
            output, _ = child.communicate(timeout=120)
            got = json.loads(output.splitlines()[-1])
            found |= {**got, "wrong": found["wrong"] + got["wrong"]}
    wrong = found.pop("wrong", 0)
    warm = memory[int(len(memory) * WARM_UP) :]
    half = len(warm) // 2
    early, late = (sorted(part)[len(part) // 2] for part in (warm[:half], warm[half:]))
    least, most = min(found.values()), max(found.values())
    print(f"{len(found)} clients, {arguments.minutes:g} minutes, {2 * sum(found.values()) * 2} products, {wrong} wrong")
    print(f"steps of a client: {least} to {most}")
    print(f"worker's own memory after warm-up, medians of both halves: {early / 1e6:.1f} MB, {late / 1e6:.1f} MB")
    fair = least * 2 >= most
    flat = late - early < GROWTH
    print("results", "WRONG" if wrong else "right")
    print("shares", "fair" if fair else "UNFAIR")
    print("memory", "flat" if flat else "GROWING")
    return 0 if not wrong and fair and flat and len(found) == arguments.clients else 1


if __name__ == "__main__":
    sys.exit(main())
