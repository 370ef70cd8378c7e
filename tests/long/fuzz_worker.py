"""Coverage-guided fuzzing of what strangers can send: ``make fuzz RUNS=100000``.

Inputs are mutations of valid messages, or raw bytes, through ``unpack``, the service and a worker with open sessions of
every encryption. Every one gets an answer, and good clients still get right ones afterwards.
"""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import atheris

with atheris.instrument_imports(include=["ciphertune", "ciphertune_mlwe", "ciphertune_clear", "ciphertune_zmq"]):
    import torch

    from ciphertune.client.choice import choose
    from ciphertune.errors import ProtocolError
    from ciphertune.protocol import Limits, Message, pack, unpack
    from ciphertune.weights import describe, group_map, quantize
    from ciphertune.worker import Service, SessionLimits, WeightStore, Worker
    from ciphertune_zmq.framing import unwrap

torch.set_num_threads(1)
WEIGHT = quantize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 8)
MAP = group_map([describe("a", WEIGHT)], "forward")
LIMITS = Limits(buffer_bytes=1 << 22, total_bytes=1 << 23)
ANSWER_SECONDS = 20

now = 0.0
worker = Worker(
    WeightStore.of({"a": WEIGHT}),
    limits=SessionLimits(sessions=64, all_sessions=64, idle_seconds=600),
    clock=lambda: now,
    backends=("clear", "mlwe", "simulation"),
)
service = Service(worker, limits=LIMITS)


def call(frames: list[Any]) -> Message:
    """The service's answer; every request has one."""
    answers: list[Message] = []
    arrived = threading.Event()

    def reply(frames: list[Any], release: Any) -> None:
        answers.append(unpack(frames))
        release()
        arrived.set()

    service.submit(frames, "fuzz", reply)
    if not arrived.wait(ANSWER_SECONDS):
        raise AssertionError("a request was not answered")
    return answers[0]


class Client:
    """A good client with a session of its own."""

    def __init__(self, name: str) -> None:
        self.backend = choose(name).backend
        self.half = self.backend.client(torch.device("cpu"))
        self.x = torch.randn(3, 4)
        public = dict(self.half.open_fields())
        preparation = self.half.preparation(MAP, group_map([describe("a", WEIGHT)], "backward"))
        if preparation is not None:
            preparation.absorb(0, WEIGHT.codes)
            preparation.finish()
        self.opening = Message("open", {"backend": self.backend.name, "groups": [["a"]], "public": public})
        self.open()

    def open(self) -> None:
        session = call(pack(self.opening)).fields["session"]
        self.encrypted = self.half.encrypt(self.x, MAP)
        fields = {"session": session, "group": 0, "direction": "forward"}
        self.request = Message("evaluate", fields, self.encrypted.buffers)

    def check(self) -> None:
        reply = call(pack(self.request))
        if reply.fields.get("code") == "unknown-session":  # a mutation was a valid 'close'
            self.open()
            reply = call(pack(self.request))
        if reply.kind != "ok":
            raise AssertionError(f"a good request was refused: {reply.fields}")
        y = self.half.decrypt(reply.buffers, self.encrypted.state, MAP)
        expected = self.x @ WEIGHT.codes.float().t()
        if float((y - expected).norm() / expected.norm()) > 0.05:
            raise AssertionError("a good request got a wrong answer")


CLIENTS = [Client(name) for name in ("clear?weight_bits=8", "mlwe", "simulation")]
MODELS = [message for client in CLIENTS for message in (client.request, client.opening)]
MODELS += [Message(kind) for kind in ("hello", "manifest", "stats", "close")]
# Streamed codes: rows that are there, that are not, and of a layer that is none.
MODELS += [
    Message("weights", {"layer": layer, "start": start, "stop": stop})
    for layer, start, stop in (("a", 0, 6), ("a", 2, 3), ("a", 5, 1 << 40), ("b", 0, 1))
]
# What is asked for under a backend that this worker does not offer, and of fields that no client sends.
MODELS += [
    Message("open", {"backend": name, "groups": [["a"]], "public": {"junk": 1}})
    for name in ("mlwe", "concrete", "ckks")
]
count = 0


def mutated(rng: random.Random, source: Any) -> list[bytes]:
    """A valid message with a few changes: the input's own bytes at places that a generator seeded by it picks."""
    frames = [bytearray(frame) for frame in pack(rng.choice(MODELS))]
    for _ in range(rng.randint(0, 4)):
        frame = rng.choice(frames)
        at = rng.randint(0, len(frame))
        frame[at : at + rng.choice((0, 1, 1, 2, 8))] = source.ConsumeBytes(rng.randint(0, 9)) or rng.randbytes(1)
    return [bytes(frame) for frame in frames]


def check_reply(frames: list[Any]) -> None:
    """What a worker may send is taken by the check of a good client, or refused with the error for it."""
    try:
        message = unpack(frames, CLIENTS[1].request.reply_limits)
        CLIENTS[1].half.check_reply(message.buffers, CLIENTS[1].encrypted.state, MAP)
    except ProtocolError:
        return
    raise AssertionError("mutated bytes passed for the product that was asked for")


def one_input(data: bytes) -> None:
    global count, now
    count += 1
    source = atheris.FuzzedDataProvider(data)
    if source.ConsumeIntInRange(0, 3) == 0:
        frames = [source.ConsumeBytes(source.ConsumeIntInRange(0, 200)) for _ in range(source.ConsumeIntInRange(0, 4))]
    else:
        frames = mutated(random.Random(data), source)
    envelope = source.ConsumeBytes(source.ConsumeIntInRange(8, 40))
    try:
        unwrap(envelope, frames)
    except Exception as error:
        if type(error).__name__ != "ProtocolError":
            raise
    if call(frames).kind not in ("ok", "error"):
        raise AssertionError("neither an answer nor an error")
    if service.load.under_way or service.load.nbytes:
        raise AssertionError("something is still under way")
    room = service.reserve("fuzz", source.ConsumeIntInRange(0, 1 << 40))
    if room is not None:
        room()
    check_reply(frames)
    if worker.prepared_bytes > 1 << 16 or sum(len(held.prepared) for held in worker.held) > 64:
        raise AssertionError("prepared weights are kept more than once")
    if service.counters.errors["internal"]:
        raise AssertionError("the worker failed in a way that was not foreseen")
    if count % 1000 == 0:
        # Sessions that mutated openings left behind would fill the quota.
        now += 601
        worker.expire()
        for client in CLIENTS:
            client.open()
            client.check()


atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
