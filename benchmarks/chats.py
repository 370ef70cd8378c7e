"""Many chats at one worker against one: ``python benchmarks/chats.py --chats 16``, some three minutes.

Each chat is a client with a key, a connection and a session of its own. First one generates text for itself, and the
requests of its tokens are recorded; then 1, 2, 4 … chats each send the requests of a token over and over, one after
the other as generation has to, and the tokens that the worker answers are counted. What clients compute takes no time
then: the figures are the worker's, for clients that are fast enough. ``--think`` adds what a client computes, as a
pause before each request. The worker has a core, and the clients another.

``joined`` is the share of products that the worker evaluated together with others'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from capacity import Replaying
from predict import CORES, on
from sweep import machine

import ciphertune
from ciphertune.bundle.client import load_client
from ciphertune.client.connection import WorkerConnection
from ciphertune.protocol import Message
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

PROMPT, TOKENS = 8, 4
"""Tokens of the prompt, and of the answer that is recorded."""


def record(to: str, client: Path) -> tuple[Message, list[Message], float]:
    """The request that opens a session, those of one token, and the tokens a second of a real chat."""
    sent: list[Message] = []
    submit = WorkerConnection.submit

    def recording(self: WorkerConnection, request: Message, *rest: Any) -> Any:
        if request.kind in ("open", "evaluate"):
            kept = {name: buffer.clone() for name, buffer in request.buffers.items()}
            sent.append(Message(request.kind, dict(request.fields), kept))
        return submit(self, request, *rest)

    with mock.patch.object(WorkerConnection, "submit", recording):
        model = load_client(client, to)
        model.generation_config.eos_token_id = None
        ids = torch.arange(1, PROMPT + 1)[None]
        ends: list[tuple[float, int]] = []
        forward = model.forward

        def watched(*args: Any, **values: Any) -> Any:
            found = forward(*args, **values)
            ends.append((time.perf_counter(), len(sent)))
            return found

        model.forward = watched
        model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        ciphertune.session_of(model).close()
    (opened,) = (message for message in sent if message.kind == "open")
    rate = (len(ends) - 1) / (ends[-1][0] - ends[0][0])
    return opened, sent[ends[-2][1] : ends[-1][1]], rate


class Chat(Replaying):
    """A chat that sends the requests of a token over and over."""

    def run(self, think: float, until: float, seed: int) -> None:
        """Generate until then; the first token starts somewhere in its middle, as chats that began at other times."""
        start = random.Random(seed).randrange(len(self._asked))
        for request in self._asked[start:]:
            self._answer(request)
        while time.monotonic() < until:
            begun = time.monotonic()
            for request in self._asked:
                if think:
                    time.sleep(think)
                self._answer(request)
            self.seconds.append(time.monotonic() - begun)


def counted(port: int) -> tuple[float, float]:
    """Products of the worker so far, and those of them that were evaluated together with others."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    products = re.search(r'^ciphertune_requests_total\{kind="evaluate"\} (\S+)$', text, re.M)
    joined = re.search(r"^ciphertune_joined_products_total (\S+)$", text, re.M)
    return float(products[1]) if products else 0.0, float(joined[1]) if joined else 0.0


def measured(everyone: Sequence[Chat], think: float, seconds: float, port: int) -> dict[str, float]:
    """Tokens a second of all chats, seconds of a token, and the share of products that were joined."""
    before = counted(port)
    begun = time.monotonic()
    threads = [
        threading.Thread(target=one.run, args=(think, begun + seconds, seed)) for seed, one in enumerate(everyone)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    products, joined = (now - then for now, then in zip(counted(port), before, strict=True))
    found = sorted(value for one in everyone for value in one.seconds)
    return {
        "chats": len(everyone),
        "tokens_per_second": len(found) / took,
        "median_s": found[len(found) // 2],
        "p99_s": found[min(len(found) - 1, int(0.99 * len(found)))],
        "joined": joined / products,
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a name, or a folder")
    parser.add_argument("--chats", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=20, help="of each run")
    parser.add_argument("--think", type=float, default=0.0, help="seconds that a client computes before each request")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    os.sched_setaffinity(0, {CORES[0]})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        ciphertune.split(arguments.model, folder / "bundle")
        names = [f"chat{number}" for number in range(max(arguments.chats))]
        ZmqTransport.make_keys(folder / "keys", names, worker=True)
        serve = {"curve": str(folder / "keys")}
        more = ("--threads", "1", "--metrics-port", str(port))
        with (
            on(CORES[-1]),
            worker_process(folder / "bundle" / "worker", "zmq", "127.0.0.1:*", serve, more) as (address, _),
        ):
            tos = [f"mlwe+zmq://{address}?curve={folder / 'keys'}&client={each}" for each in names]
            opened, asked, rate = record(tos[0], folder / "bundle" / "client")
            print(f"one chat that encrypts, on this machine: {rate:.2f} tokens/s; {len(asked)} requests a token")
            for count in arguments.chats:
                everyone = [Chat(to, opened, asked) for to in tos[:count]]
                rows.append(measured(everyone, arguments.think, arguments.seconds, port))
                for one in everyone:
                    one.close()
                row = rows[-1]
                print(
                    f"{count} chats: {row['tokens_per_second']:.1f} tokens/s of all, "
                    f"{row['tokens_per_second'] / rows[0]['tokens_per_second']:.1f} times the first row; a token "
                    f"{1000 * row['median_s']:.0f} ms, p99 {1000 * row['p99_s']:.0f} ms; {row['joined']:.0%} joined",
                    flush=True,
                )
    if arguments.json is not None:
        found = {"machine": machine(before), "model": arguments.model, "tokens_per_second_real": rate, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
