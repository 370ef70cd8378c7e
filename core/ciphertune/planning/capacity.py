"""Capacity: what many clients get from the workers of one model, how many workers they need, and what tokens cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ciphertune.bundle.placement import Placement
from ciphertune.errors import ConfigError
from ciphertune.planning.estimate import Costs
from ciphertune.planning.generating import (
    forward_groups,
    forward_only,
    measure_generation,
    output_head,
    prompt_groups,
)
from ciphertune.planning.measure import local_selection, measure_speeds
from ciphertune.planning.products import PlannedModel, Products
from ciphertune.planning.queueing import Kind, Lines, Load, Pass, Waiting, simulate_clients
from ciphertune.planning.simulation import MicroBatch, Product, Request
from ciphertune.planning.speeds import LinkSpeed, Speeds, check_backend

TRAINING, CHATS = "training", "chats"
"""Names of kinds of clients."""

_MOST_CLIENTS = 2000
"""Of one copy of the model: a simulation of more takes minutes, and waits of hours need no simulation."""
_EACH = 100
"""Requests of each client are simulated as this part of ``requests``."""
_MOST_COPIES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ClientMix:
    """What clients do.

    Attributes:
        clients: how many.
        chats: share of them that chat, 0 to 1; the others train, one step after the other.
        tokens: of a training step.
        targets, length: as of ``ciphertune.planning.plan.make_plan``.
        prompt_tokens, new_tokens: of a question and of its answer.
        think: mean seconds from an answer to the next question.
    """

    clients: int
    chats: float = 0.0
    tokens: int = 1024
    targets: Sequence[str] = ("q_proj", "v_proj")
    length: int = 256
    prompt_tokens: int = 128
    new_tokens: int = 128
    think: float = 30.0


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices, in one currency.

    Attributes:
        worker: of a worker, an hour.
        traffic: of a gigabyte, either way.
    """

    worker: float = 0.0
    traffic: float = 0.0


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What clients get from a number of workers.

    Attributes:
        workers: how many.
        copies: of the model; clients are divided over them.
        kinds: seconds and tokens of ``TRAINING`` (a step) and ``CHATS`` (a token of an answer), of those there are.
        evaluating, receiving, sending: share of the time that the busiest worker, and the card of one, is at it;
            evaluating counts what the transport takes of the worker's processor.
        busiest: the largest of them, by name.
        bytes_per_second: up and down, of all clients and workers together.
        tokens_per_second: trained and generated, of all clients together.
        price: of a million tokens, machines and traffic together.
    """

    workers: int
    copies: int
    kinds: dict[str, Waiting]
    evaluating: float
    receiving: float
    sending: float
    busiest: str
    bytes_per_second: float
    tokens_per_second: float
    price: float

    @property
    def slowdown(self) -> float:
        """Median seconds over those of a client that is alone, of the kind that suffers most."""
        return max(each.median / max(each.alone, 1e-12) for each in self.kinds.values())


@dataclasses.dataclass(frozen=True)
class CapacityPlan:
    """Capacity for clients; made by ``plan_capacity``.

    Attributes:
        to, mix, placement: of the plan; the placement is of one copy of the model.
        worker_bytes: of the weights that the fullest worker holds.
        asked: what the workers that were named give; None where none were.
        tried: numbers of workers, the fewest first, up to those that ``slowdown`` needs.
        slowdown: how much longer than alone half of the clients may wait.
        speeds: of this machine, where they were measured.
    """

    to: str
    mix: ClientMix
    placement: str
    worker_bytes: int
    asked: Capacity | None
    tried: tuple[Capacity, ...]
    slowdown: float
    speeds: Speeds | None

    @property
    def enough(self) -> Capacity:
        """The fewest workers that are enough."""
        return self.tried[-1]


def plan_capacity(
    model: str,
    to: str = "mlwe",
    mix: ClientMix | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    embeddings: bool = False,
    workers: int | None = None,
    placement: Placement | str | None = None,
    worker_memory: float | None = None,
    bandwidth: float = 125e6,
    down: float | None = None,
    latency: float = 1e-3,
    worker_bandwidth: float = 1.25e9,
    client_processors: int | None = None,
    prices: Prices | None = None,
    slowdown: float = 1.5,
    requests: int = 30_000,
    measure: bool = True,
    client: Speeds | None = None,
    worker: Speeds | None = None,
) -> CapacityPlan:
    """Plan how many clients are served by how many workers. No weight is loaded.

    Every client has a line of its own, and a processor unless they share some. Clients are divided over copies of the
    model, and those of one copy are simulated (``ciphertune.planning.queueing``): thousands of copies are as one.

    Args:
        model: as of ``ciphertune.planning.plan.make_plan``.
        to: selection string; its endpoints are not asked.
        mix: what clients do; one client that trains, if None.
        layers: which layers; see ``ciphertune.outsourcing.layers.choose_layers``.
        embeddings: whether the token embedding is outsourced, too.
        workers: how many there are; if None, only the fewest that are enough are looked for.
        placement: of one copy of the model, for its number of workers; if None, one worker, or as few parts of whole
            layers as ``worker_memory`` allows.
        worker_memory: bytes of weights that a worker may hold.
        bandwidth: bytes a second from each client.
        down: bytes a second to it; as ``bandwidth`` if None.
        latency: seconds one way.
        worker_bandwidth: bytes a second of each worker's card, each way.
        client_processors: processors that all clients share; each has one of its own if None. They are divided over
            copies of the model as clients are.
        prices: of machines and traffic.
        slowdown: how much longer than alone half of the clients may wait.
        requests: to simulate at each number of workers, or a 100th of that for each client; more are more exact.
        measure: take some seconds to measure this machine where ``client`` or ``worker`` is not given.
        client: speeds of a client's machine.
        worker: speeds of a worker's.

    Raises:
        ConfigError: an argument is wrong, nothing is known of speeds, or too many clients share a copy.
        SelectionError, LayerError: about ``to``, ``layers`` and ``embeddings``.
    """
    asked, prices = mix or ClientMix(1), prices or Prices()
    down = bandwidth if down is None else down
    _check(asked, workers, min(bandwidth, down, worker_bandwidth), latency, slowdown)
    products = Products(model, to, layers, asked.targets, embeddings)
    placed, planned = _copy_of(products, placement, worker_memory)
    if not planned.groups:
        raise ConfigError("nothing is outsourced, so clients need no worker")
    check_backend(client, worker, local_selection(planned.choice))
    speeds = None
    if client is None or worker is None:
        if not measure:
            raise ConfigError("a capacity needs speeds: measure them here, or name files of --save-speeds")
        speeds = _measure(model, planned, asked, as_client=client is None)
    of_client, of_worker = client or speeds, worker or speeds
    assert of_client is not None
    assert of_worker is not None
    passes = _passes(planned, asked, of_client, of_worker)
    passes = {name: tuple(_carried(one, of_client.link) for one in cycle) for name, cycle in passes.items()}
    if client_processors is not None and client_processors < 1:
        raise ConfigError("clients need a processor at least")

    def capacity(copies: int) -> Capacity:
        shared = 0 if client_processors is None else max(1, client_processors // copies)
        lines = Lines(bandwidth, down, latency, worker_bandwidth, shared)
        return _capacity(passes, asked, placed.workers, copies, lines, prices, requests)

    named = None
    if workers is not None:
        if workers % placed.workers:
            raise ConfigError(f"{workers} workers cannot be divided into copies of {placed.workers} ({placed})")
        named = capacity(workers // placed.workers)
    return CapacityPlan(
        to=str(planned.choice.selection),
        mix=asked,
        placement=str(placed),
        worker_bytes=planned.worker_bytes,
        asked=named,
        tried=tuple(_fewest(capacity, asked.clients, slowdown)),
        slowdown=slowdown,
        speeds=speeds,
    )


def _check(mix: ClientMix, workers: int | None, rate: float, latency: float, slowdown: float) -> None:
    counts = mix.clients, mix.tokens, mix.prompt_tokens, mix.new_tokens, workers or 1
    if min(counts) < 1 or rate <= 0 or latency < 0 or mix.think < 0:
        raise ConfigError("clients, tokens, workers and bandwidths must be above 0, latency and pauses not below")
    if not 0 <= mix.chats <= 1:
        raise ConfigError(f"{mix.chats:g} is no share of clients that chat: say 0 to 1")
    if slowdown <= 1:
        raise ConfigError(f"a slowdown of {slowdown:g} is no more than a client alone has: say more than 1")


def _copy_of(
    products: Products, placement: Placement | str | None, memory: float | None
) -> tuple[Placement, PlannedModel]:
    if placement is not None:
        placed = Placement.read(str(placement))
        return placed, products.placed(placed)
    placed, planned = Placement(), products.placed(Placement())
    most = len(planned.groups) + 1
    while memory is not None and planned.worker_bytes > memory:
        if placed.layers >= most:
            raise ConfigError(
                f"the largest group of layers is {planned.worker_bytes / 1e9:.3g} GB, more than a worker may hold: "
                f"name a placement with rows, as {placed},rows:2"
            )
        placed = Placement(layers=placed.layers + 1)
        planned = products.placed(placed)
    return placed, planned


def _measure(model: str, planned: PlannedModel, mix: ClientMix, as_client: bool) -> Speeds:
    """Measure this machine at what clients do."""
    training = chatting = None
    if mix.chats < 1:
        training = measure_speeds(model, planned, mix.targets, mix.tokens, mix.length, as_client)
    if mix.chats > 0:
        chatting = measure_generation(model, planned, (1, mix.prompt_tokens), 1, as_client and training is None)
    if training is None or chatting is None:
        found = training or chatting
        assert found is not None
        return found
    return dataclasses.replace(training, products=(*training.products, *chatting.products))


def _passes(planned: PlannedModel, mix: ClientMix, client: Speeds, worker: Speeds) -> dict[str, tuple[Pass, ...]]:
    """What a client of each kind does."""
    if client.client_compute is None:
        raise ConfigError(
            "the client's speeds lack its own computation: measure them on the client, with the same model"
        )
    backend = planned.choice.backend
    found: dict[str, tuple[Pass, ...]] = {}
    if mix.chats < 1:
        compute = client.client_compute
        step = Costs(backend, client, worker, compute).micro_batch(planned.groups, mix.tokens)
        step = dataclasses.replace(step, rest=step.rest + compute.optimizer)
        found[TRAINING] = (Pass(step, mix.tokens),)
    if mix.chats > 0:
        forward = forward_only(client)
        assert forward.client_compute is not None
        costs = Costs(backend, forward, worker, forward.client_compute)
        prompts = prompt_groups(planned, output_head(planned.model), 1)
        prompt = Pass(costs.micro_batch(prompts, mix.prompt_tokens), 1, counted=mix.new_tokens == 1)
        token = Pass(costs.micro_batch(forward_groups(planned), 1), 1, times=mix.new_tokens - 1)
        found[CHATS] = (prompt, token) if mix.new_tokens > 1 else (prompt,)
    return found


def _carried(one: Pass, link: LinkSpeed | None) -> Pass:
    """A pass whose messages take time as well, most of it the worker's: its processor encrypts, checks and copies."""
    if link is None:
        return one

    def carried(request: Request) -> Request:
        nbytes = request.up + request.down
        return with_transport(request, link.waited(nbytes), link.worked(nbytes))

    products = [Product(each.rest, tuple(map(carried, each.requests))) for each in one.batch.products]
    return dataclasses.replace(one, batch=MicroBatch(products, one.batch.rest))


def with_transport(request: Request, waited: float, worked: float) -> Request:
    """A request with what its messages take.

    Args:
        request: without it.
        waited: seconds that a client waits for them which is alone.
        worked: seconds of the worker's processor. What the client does not wait for comes after the reply, and what the
            worker does not do the client does.
    """
    return dataclasses.replace(
        request,
        evaluate=request.evaluate + min(waited, worked),
        after=max(0.0, worked - waited),
        decrypt=request.decrypt + max(0.0, waited - worked),
    )


def _capacity(
    passes: dict[str, tuple[Pass, ...]],
    mix: ClientMix,
    parts: int,
    copies: int,
    lines: Lines,
    prices: Prices,
    requests: int,
) -> Capacity:
    # The fullest copy: clients are divided as evenly as whole ones can be.
    chats = round(mix.clients * mix.chats)
    everywhere = {TRAINING: mix.clients - chats, CHATS: chats}
    counts = {name: -(-count // copies) for name, count in everywhere.items()}
    clients = sum(counts.values())
    if clients > _MOST_CLIENTS + 1:
        least = parts * -(-mix.clients // _MOST_CLIENTS)
        raise ConfigError(f"{clients:,} clients would share one copy of the model: name {least} workers or more")
    kinds = [
        Kind(name, counts[name], cycle, mix.think if name == CHATS else 0.0)
        for name, cycle in passes.items()
        if counts[name]
    ]
    load: Load = simulate_clients(kinds, parts, lines, max(requests, requests * clients // _EACH))
    tokens = sum(each.tokens_per_second * everywhere[name] / counts[name] for name, each in load.kinds.items())
    sent = load.bytes_per_second * mix.clients / clients
    workers = parts * copies
    cost = workers * prices.worker / 3600 + sent / 1e9 * prices.traffic
    return Capacity(
        workers=workers,
        copies=copies,
        kinds=load.kinds,
        evaluating=load.evaluating,
        receiving=load.receiving,
        sending=load.sending,
        busiest=load.busiest,
        bytes_per_second=sent,
        tokens_per_second=tokens,
        price=1e6 * cost / max(tokens, 1e-12),
    )


def _fewest(capacity: Callable[[int], Capacity], clients: int, slowdown: float) -> list[Capacity]:
    """Numbers of copies by doubling, then the fewest that are enough, between the last two by bisection."""
    copies = -(-clients // _MOST_CLIENTS)
    found = [capacity(copies)]
    while found[-1].slowdown > slowdown and copies < min(clients, _MOST_COPIES):
        copies = min(2 * copies, clients)
        found.append(capacity(copies))
    few, enough = (found[-2].copies if len(found) > 1 else copies - 1), found[-1]
    while enough.copies - few > max(1, enough.copies // 16):
        middle = capacity((few + enough.copies) // 2)
        if middle.slowdown > slowdown:
            few = middle.copies
            found.insert(-1, middle)
        else:
            enough = found[-1] = middle
    return sorted(found, key=lambda each: each.workers)
