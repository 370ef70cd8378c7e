"""Many chats at one worker against one: ``python benchmarks/chats.py --chats 16``, some three minutes.

Each chat is a client with a key, a connection and a session of its own. First one generates text for itself, and the
requests of its tokens are recorded; then 1, 2, 4 … chats each send the requests of a token over and over, one after
the other as generation has to, and the tokens that the worker answers are counted. What clients compute takes no time
then: they send bytes that were packed once, and the figures are the worker's, for clients that are fast enough.
``--think`` adds what a client computes, as a pause before each request. The worker has a core, and the clients another.

``joined`` is the share of products that the worker evaluated together with others'. ``worker_s`` and ``clients_s`` are
processor seconds a second: whose core was full says what the figures are of.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import random
import re
import socket
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zmq
from capacity import Replaying
from predict import CORES, on
from sweep import machine

import ciphertune
from ciphertune._support.processor import processor_seconds
from ciphertune.bundle.client import load_client
from ciphertune.client.choice import choose
from ciphertune.client.connection import WorkerConnection
from ciphertune.protocol import Message, pack, unpack
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport
from ciphertune_zmq.address import parse
from ciphertune_zmq.framing import NUMBER_BYTES, unwrap, wrap
from ciphertune_zmq.security import client_curve

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
    """A chat that sends the requests of a token over and over, over a socket of its own.

    Args:
        to, opened, asked: as for ``Replaying``.
        seed: says which request is the first, as of chats that began at other times.
    """

    def __init__(self, to: str, opened: Message, asked: Sequence[Message], seed: int) -> None:
        super().__init__(to, opened, asked)
        choice = choose(to)
        address = parse(choice.selection.endpoints[0])
        curve = client_curve(address, choice.transport.options)
        assert curve is not None
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.curve_publickey, self.socket.curve_secretkey = curve.pair.public, curve.pair.secret
        self.socket.curve_serverkey = curve.server
        self.socket.connect(address.zmq)
        self._packed = [wrap(bytes(NUMBER_BYTES), pack(request), True) for request in self._asked]
        self._next = random.Random(seed).randrange(len(self._packed))
        self._begun = 0.0
        self.requests = len(self._packed)
        self.answered = 0

    def send(self) -> None:
        self.socket.send_multipart(self._packed[self._next], copy=True)

    def receive(self) -> None:
        """Take a reply; the first of each request is looked at."""
        parts = self.socket.recv_multipart(copy=True)
        if self.answered < len(self._packed):
            assert unpack(unwrap(parts[0], parts[1:])).kind == "ok"
        self.answered += 1
        self._next += 1
        if self._next == len(self._packed):
            self._next, now = 0, time.monotonic()
            if self._begun:
                self.done.append((now, now - self._begun))
            self._begun = now

    def close(self) -> None:
        self.socket.close()
        super().close()


def carry(everyone: Sequence[Chat], think: float, seconds: float) -> None:
    """Have all chats generate for so long."""
    poller, of = zmq.Poller(), {chat.socket: chat for chat in everyone}
    due: list[tuple[float, int]] = []
    for chat in everyone:
        poller.register(chat.socket, zmq.POLLIN)
        chat.send()
    waiting, until = len(everyone), time.monotonic() + seconds
    while waiting or due:
        wait = None if not due else max(0, int(1000 * (due[0][0] - time.monotonic())))
        for ready, _ in poller.poll(wait):
            chat = of[ready]
            chat.receive()
            waiting -= 1
            if time.monotonic() < until:
                heapq.heappush(due, (time.monotonic() + think, everyone.index(chat)))
        while due and due[0][0] <= time.monotonic():
            everyone[heapq.heappop(due)[1]].send()
            waiting += 1


def counted(port: int) -> tuple[float, float]:
    """Products of the worker so far, and those of them that were evaluated together with others."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    products = re.search(r'^ciphertune_requests_total\{kind="evaluate"\} (\S+)$', text, re.M)
    joined = re.search(r"^ciphertune_joined_products_total (\S+)$", text, re.M)
    return float(products[1]) if products else 0.0, float(joined[1]) if joined else 0.0


def measured(everyone: Sequence[Chat], think: float, seconds: float, port: int, pid: int) -> dict[str, float]:
    """Tokens a second of all chats, seconds of a token, and the share of products that were joined."""
    carry(everyone, think, 1.0)
    for chat in everyone:
        chat.done.clear()
    before, answered = counted(port), sum(chat.answered for chat in everyone)
    begun, used, own = time.monotonic(), processor_seconds(pid) or 0.0, time.process_time()
    carry(everyone, think, seconds)
    took = time.monotonic() - begun
    used, own = (processor_seconds(pid) or 0.0) - used, time.process_time() - own
    products, joined = (now - then for now, then in zip(counted(port), before, strict=True))
    found = sorted(value for one in everyone for _, value in one.done)
    answered = sum(chat.answered for chat in everyone) - answered
    return {
        "chats": len(everyone),
        "tokens_per_second": answered / everyone[0].requests / took,
        "median_s": found[len(found) // 2],
        "p99_s": found[min(len(found) - 1, int(0.99 * len(found)))],
        "joined": joined / products,
        "worker_s": used / took,
        "clients_s": own / took,
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
        with contextlib.ExitStack() as stack:
            with on(CORES[-1]):  # the worker alone, which starts here
                process = worker_process(folder / "bundle" / "worker", "zmq", "127.0.0.1:*", serve, more)
                address, pid = stack.enter_context(process)
            tos = [f"mlwe+zmq://{address}?curve={folder / 'keys'}&client={each}" for each in names]
            opened, asked, rate = record(tos[0], folder / "bundle" / "client")
            print(f"one chat that encrypts, on this machine: {rate:.2f} tokens/s; {len(asked)} requests a token")
            for count in arguments.chats:
                everyone = [Chat(to, opened, asked, seed) for seed, to in enumerate(tos[:count])]
                rows.append(measured(everyone, arguments.think, arguments.seconds, port, pid))
                for one in everyone:
                    one.close()
                row = rows[-1]
                print(
                    f"{count} chats: {row['tokens_per_second']:.1f} tokens/s of all, "
                    f"{row['tokens_per_second'] / rows[0]['tokens_per_second']:.1f} times the first row; a token "
                    f"{1000 * row['median_s']:.0f} ms, p99 {1000 * row['p99_s']:.0f} ms; {row['joined']:.0%} joined; "
                    f"of their cores the worker used {row['worker_s']:.0%} and the clients {row['clients_s']:.0%}",
                    flush=True,
                )
    if arguments.json is not None:
        found = {"machine": machine(before), "model": arguments.model, "tokens_per_second_real": rate, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
