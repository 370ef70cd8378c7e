"""Remote workers in this process: real ones behind links that do what a test tells them to."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import ciphertune
from ciphertune.client.choice import choose
from ciphertune.client.session import Session
from ciphertune.outsourcing.calibration import Calibration
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager
from ciphertune.protocol import Message, pack, unpack
from ciphertune.transport import Link, LocalWorker, PendingReplies, Transport
from ciphertune.weights import Shard, describe, quantize
from ciphertune.worker import WeightStore, Worker

Rows = tuple[str, int, int | None]
"""A layer and the rows of it that are held."""
Blocks = Sequence[Sequence[str | Rows]]
Script = Callable[[Message], Message | None]
"""Answers a request, or with None never does; what it raises is what the link fails with."""

SECONDS = 120.0
"""Longer than anything here takes; a test that waits so long has failed."""


def store(model: nn.Module, bits: Any, blocks: Blocks) -> WeightStore:
    """Some layers of a model, or rows of them."""
    held = WeightStore()
    for block in blocks:
        shards: list[Shard] = []
        codes = []
        for name, start, stop in ((row, 0, None) if isinstance(row, str) else row for row in block):
            weight = quantize(model.get_submodule(name).weight, bits)  # type: ignore[arg-type]
            shards.append(describe(name, weight).shard(start, stop))
            codes.append(weight.codes[start:stop])
        held.add(shards, torch.cat(codes))
    return held


class Host:
    """A machine with a worker.

    Attributes:
        worker: what answers; another one stands for a restart.
        up: whether anything listens.
        script: takes requests in the worker's place; it may hand them on to ``answer``.
        seen: kinds of requests that came.
        bytes_in: of their buffers.
        closed: how often a link to it was closed.
    """

    def __init__(self, name: str, held: WeightStore, pool: ThreadPoolExecutor) -> None:
        self.name = name
        self.held = held
        self.worker = Worker(held)
        self.up = True
        self.script: Script = self.answer
        self.seen: list[str] = []
        self.bytes_in = 0
        self.closed = 0
        self.pending: PendingReplies[Message] = PendingReplies(name)
        self._pool = pool
        self._lock = threading.Lock()

    def answer(self, request: Message) -> Message:
        return self.worker.handle(request, "client")

    def on(self, kind: str, *scripts: Script, always: bool = False) -> None:
        """Let the scripts take one request of a kind each, or the first of them all; then answer as ever."""
        waiting = list(scripts)

        def script(request: Message) -> Message | None:
            with self._lock:
                mine = request.kind == kind and bool(waiting)
                chosen = (waiting[0] if always else waiting.pop(0)) if mine else self.answer
            return chosen(request)

        self.script = script

    def crash(self, request: Message | None = None) -> None:
        """Go down; what is under way fails."""
        self.up = False
        self.pending.fail_all("the connection was lost")

    def restart(self, held: WeightStore | None = None) -> None:
        """Come up with no session open, and perhaps with other weights."""
        self.worker = Worker(self.held if held is None else held)
        self.up = True

    def count(self, kind: str) -> int:
        return self.seen.count(kind)

    def take(self, request: Message) -> Future[Message]:
        number, future = self.pending.add()
        if not self.up:
            self.pending.fail(number, "nothing answers there")
            return future
        self.seen.append(request.kind)
        self.bytes_in += request.nbytes
        self._pool.submit(self._serve, unpack(pack(request)), number)
        return future

    def _serve(self, request: Message, number: int) -> None:
        try:
            reply = self.script(request)
            if reply is not None:
                self.pending.answer(number, unpack(pack(reply)))
        except Exception as error:
            self.pending.fail(number, error)


def never(request: Message) -> None:
    """A request without an answer."""


class HostLink(Link):
    def __init__(self, host: Host) -> None:
        self.host = host
        self.name = host.name

    def submit(self, request: Message) -> Future[Message]:
        return self.host.take(request)

    def close(self) -> None:
        self.host.closed += 1
        self.host.pending.fail_all("the link is closed")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    pass


class FarmTransport(Transport):
    name = "farm"
    Options = NoOptions
    joining_seconds = 0.02
    hosts: Mapping[str, Host]

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[Link]:
        assert worker is None, "weights were handed to a remote transport"
        return [HostLink(self.hosts[endpoint]) for endpoint in endpoints]

    def joining_workers(self, endpoints: tuple[str, ...], links: Sequence[Link]) -> list[Link]:
        known = {link.name for link in links}
        return [HostLink(host) for name, host in self.hosts.items() if name not in known]


class Farm:
    """Hosts that hold parts of a model, and models outsourced to them.

    Attributes:
        hosts: by name.
        sessions: opened through ``outsource``.
        threads: on which hosts answer.
        transport: which reaches them.
    """

    def __init__(self, register: Callable[[str, Any], None], elastic: bool = False) -> None:
        self.hosts: dict[str, Host] = {}
        self.sessions: list[Session] = []
        self.threads = ThreadPoolExecutor(32, "farm")
        self.transport = type("Farmed", (FarmTransport,), {"hosts": self.hosts, "elastic": elastic})
        register(registry.TRANSPORTS, self.transport)

    def plant(self, model: nn.Module, backend: str = "clear", **plan: Blocks) -> list[Host]:
        """A host for each entry of the plan, by name, with these blocks of the model."""
        bits = choose(backend).backend.weight_bits
        return self.serve(**{name: store(model, bits, blocks) for name, blocks in plan.items()})

    def serve(self, **stores: WeightStore) -> list[Host]:
        """A host for each store, by name."""
        new = [Host(name, held, self.threads) for name, held in stores.items()]
        self.hosts.update({host.name: host for host in new})
        return new

    def selection(self, backend: str = "clear", **options: Any) -> str:
        options = {"deadline": SECONDS, "connect_timeout": SECONDS, "allow_insecure": 1, **options}
        return f"{backend}+farm://{','.join(self.hosts)}?" + "&".join(f"{k}={v}" for k, v in options.items())

    def outsource(
        self,
        model: nn.Module,
        backend: str = "clear",
        plugins: PluginManager | None = None,
        calibration: Calibration | None = None,
        **options: Any,
    ) -> Session:
        """Outsource all linear layers to all hosts; the session."""
        to = self.selection(backend, **options)
        ciphertune.outsource(model, to, "all", calibration=calibration, plugins=plugins)
        session = ciphertune.session_of(model)
        self.sessions.append(session)
        return session

    def close(self) -> None:
        """Close all, and see that nothing was left behind."""
        for host in self.hosts.values():
            host.script = host.answer
        try:
            for session in self.sessions:
                assert [worker.in_flight for worker in session.pool.workers] == [0] * len(session.pool.workers)
                session.close()
            assert [host.name for host in self.hosts.values() if host.pending] == []
        finally:
            self.threads.shutdown()


@contextlib.contextmanager
def thread(target: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run beside the test; what came of it."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(target())
        except BaseException as error:
            outcome.set_exception(error)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    yield outcome
    running.join(SECONDS)
    assert not running.is_alive(), "it hangs"
