"""Measurements of this machine: products of given sizes, copying, and a transport with a worker beside it."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ciphertune._support.environment import machine
from ciphertune._support.options import split_options
from ciphertune._support.processor import processor_seconds
from ciphertune.backend import DIRECTIONS, Backend, Direction
from ciphertune.client.choice import Choice, choose
from ciphertune.client.preparing import HeldCodes, prepare
from ciphertune.client.session import Session
from ciphertune.errors import ConfigError
from ciphertune.models.known import skeleton
from ciphertune.outsourcing.convert import outsource, session_of
from ciphertune.outsourcing.layers import Candidate, choose_layers, linear_layers
from ciphertune.planning.client_compute import BLOCKS, measure_client_compute
from ciphertune.planning.products import PlannedModel
from ciphertune.planning.speeds import ClientCompute, Line, LinkSpeed, ProductSpeed, Speeds, product_name
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.selection import Selection, SessionOptions
from ciphertune.traffic import Traffic
from ciphertune.weights import describe, group_map, quantize
from ciphertune.worker import WeightStore, Worker
from ciphertune.workloads.local_worker import serving_process

_COPIED_VALUES = 1 << 22
_SMALL, _LARGE = (1, 64, 64), (512, 1024, 2048)
"""Products whose replies are of a few hundred kilobytes, and of megabytes."""
_LINK_ROUNDS = 15
_SETTLED_SECONDS = 0.02
_PREPARED = (1024, 1024)
"""Inputs and outputs of the layer that preparing is measured with."""


_MOST_SIZES = 12
_HEAD_WEIGHTS = 1 << 24
"""Most weights of the output head of the small model that is run."""


class Size(NamedTuple):
    """A product: its direction, T, K and N of ``y = x Mᵀ``."""

    direction: Direction
    tokens: int
    in_features: int
    out_features: int


def measure_products(to: str, sizes: Sequence[Size], rounds: int = 3) -> tuple[ProductSpeed, ...]:
    """Measure products: medians over rounds, after one that is not counted; every round goes through all sizes in turn.

    What can be computed ahead of the data is, and has seconds of its own.

    Args:
        to: selection string of a backend, in this process.
        sizes: of the products.
        rounds: how many.
    """
    choice = choose(to)
    shapes = list(dict.fromkeys(_weight_shape(size) for size in sizes))
    generator = torch.Generator().manual_seed(0)
    held = {
        f"{rows}x{columns}": quantize(torch.randn(rows, columns, generator=generator), choice.backend.weight_bits)
        for rows, columns in shapes
    }
    groups = {shape: index for index, shape in enumerate(shapes)}
    infos = [describe(name, weight) for name, weight in held.items()]
    device = torch.device("cpu")
    worker = Worker(WeightStore.of(held), device)
    session = Session(choice, infos, [(i,) for i in range(len(infos))], worker, device, PluginManager())
    found: dict[Size, list[Traffic]] = {size: [] for size in sizes}
    ahead: dict[Size, list[float]] = {size: [] for size in sizes}
    try:
        for turn in range(rounds + 1):
            for size in found:
                group = groups[_weight_shape(size)]
                x = torch.randn(size.tokens, size.in_features, generator=generator)
                before = copy.copy(session.traffic)
                computed = session.compute_ahead(group, size.direction, size.tokens)
                session.product(group, size.direction, x)
                if turn:
                    found[size].append(session.traffic.since(before))
                    ahead[size].append(computed)
    finally:
        session.close()
    return tuple(
        ProductSpeed(
            *size,
            encrypt=statistics.median(t.encrypt_seconds for t in traffic),
            evaluate=statistics.median(t.evaluate_seconds for t in traffic),
            decrypt=statistics.median(t.decrypt_seconds for t in traffic),
            ahead=statistics.median(ahead[size]),
        )
        for size, traffic in found.items()
    )


def _weight_shape(size: Size) -> tuple[int, int]:
    shape = size.out_features, size.in_features
    return shape if size.direction == "forward" else shape[::-1]


def measure_copy() -> float:
    """Seconds to copy one float32 value into memory that is new."""
    source = torch.zeros(_COPIED_VALUES)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        source.clone()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / _COPIED_VALUES


def measure_link(transport: str, options: dict[str, str]) -> LinkSpeed:
    """Measure a transport, with a worker in a process of its own on this machine.

    Its cost is what a product under ``mlwe`` takes beside encrypting, evaluating and decrypting, for a small one and a
    large one, whose bytes are known: seconds that the client waits, and seconds of the worker's processor. Where the
    system does not tell those of another process, all that is waited for counts as the worker's.

    Args:
        transport: its name.
        options: of the client's end.

    Raises:
        CipherTuneError: the worker cannot be started or reached.
    """
    torch.manual_seed(0)
    small, large = nn.Linear(*_SMALL[1:], bias=False), nn.Linear(*_LARGE[1:], bias=False)
    model = nn.Sequential(small, large)
    waited: list[float] = []
    worked: list[float] = []
    sent: list[int] = []
    # With one thread, seconds of an evaluation are those of the processor.
    with serving_process(model, str(Selection("mlwe", transport, (), options)), ("--threads", "1")) as (served, pid):
        session = session_of(outsource(model, served, "all", plugins=PluginManager()))
        try:
            for group, (tokens, features, _) in enumerate((_SMALL, _LARGE)):
                x = torch.randn(tokens, features)
                session.product(group, "forward", x)
                alone, whole, before = [], copy.copy(session.traffic), _worked(pid)
                for _ in range(_LINK_ROUNDS):
                    one = copy.copy(session.traffic)
                    session.product(group, "forward", x)
                    t = session.traffic.since(one)
                    alone.append(t.wait_seconds - t.evaluate_seconds)
                after = _worked(pid)
                t = session.traffic.since(whole)
                waited.append(statistics.median(alone))
                sent.append((t.bytes_up + t.bytes_down) // _LINK_ROUNDS)
                own = None if before is None or after is None else after - before - t.evaluate_seconds
                worked.append(waited[-1] if own is None else max(0.0, own / _LINK_ROUNDS))
        finally:
            session.close()
    byte, request = _line(waited, sent)
    worker_byte, worker_request = _line(worked, sent)
    return LinkSpeed(1.0 / byte, request, worker_byte, worker_request)


def _worked(pid: int | None) -> float | None:
    """Seconds of a worker's processor, once it has nothing more to do for what was answered."""
    time.sleep(_SETTLED_SECONDS)
    return None if pid is None else processor_seconds(pid)


def _line(seconds: Sequence[float], sent: Sequence[int]) -> tuple[float, float]:
    """Seconds a byte, and those that remain, through a small and a large message."""
    (fast, slow), (few, many) = seconds, sent
    byte = max(slow - fast, 1e-9) / (many - few)
    return byte, max(0.0, fast - few * byte)


def measure_speeds(
    model: str,
    planned: PlannedModel,
    targets: Sequence[str],
    tokens: int,
    length: int,
    as_client: bool = True,
) -> Speeds:
    """Measure this machine for a plan, in some seconds.

    Args:
        model: as all others, see ``ciphertune.planning.plan.make_plan``.
        planned: products of the model.
        targets: ends of the names of those with adapters.
        tokens: of a micro-batch.
        length: of a sequence.
        as_client: also what a client computes itself, and what the transport costs.
    """
    backend, to = planned.choice.backend, local_selection(planned.choice)
    with torch.random.fork_rng(devices=[]):
        return Speeds(
            to=to,
            machine={name: str(value) for name, value in machine().items()} | {"torch": torch.__version__},
            products=measure_products(to, sizes_to_measure(planned, backend, tokens)),
            copy=measure_copy(),
            client_compute=_client_compute(model, planned, targets, tokens, length) if as_client else None,
            link=measure_transport(planned.choice) if as_client and planned.choice.transport.remote else None,
        )


def measure_preparing(to: str) -> float:
    """Seconds that a client here takes for each weight to prepare its encryption, of a layer of some size.

    Args:
        to: selection string of a backend that prepares itself, without transport.
    """
    backend = choose(to).backend
    weight = torch.randn(*reversed(_PREPARED), generator=torch.Generator().manual_seed(0))
    held = quantize(weight, backend.weight_bits)
    layers = [describe("layer", held)]
    maps = {direction: group_map(layers, direction) for direction in DIRECTIONS}
    found = []
    for _ in range(2):  # the first warms up
        # Without ``begin``: nothing of this is kept on disk, nor found there.
        client = backend.client(torch.device("cpu"))
        try:
            begun = time.perf_counter()
            read = prepare([client], [(layers, maps, ())], HeldCodes({"layer": held.codes}))
            found.append((time.perf_counter() - begun) / max(1, read))
        finally:
            client.close()
    return min(found)


def local_selection(choice: Choice) -> str:
    """Selection string of the backend alone, with its options."""
    selection = choice.selection
    _, of_backend, _ = _options(choice)
    return str(Selection(selection.backend, options=of_backend))


def sizes_to_measure(planned: PlannedModel, backend: Backend, tokens: int) -> list[Size]:
    """Products of a model, as they are cut, those with most work first and none larger than the backend allows."""
    most = backend.measured_size
    work: dict[Size, float] = {}
    for group in planned.groups:
        rows = max(1, round(tokens * group.rows))
        for piece in group.pieces:
            for m in (piece.backward,) if group.lookup else (piece.forward, piece.backward):
                sizes = (min(a, b) for a, b in zip((rows, m.in_features, m.out_features), most, strict=True))
                size = Size(m.direction, *sizes)
                work[size] = work.get(size, 0.0) + math.prod(size[1:])
    ordered = sorted(work, key=lambda size: -work[size])
    # A backend with a limit of its own takes long for a product, or to prepare for one.
    return ordered[: _MOST_SIZES if most == Backend.measured_size else 1]


def _options(choice: Choice) -> list[dict[str, str]]:
    options = choice.selection.options
    backend, transport = type(choice.backend), type(choice.transport)
    return split_options(options, SessionOptions, backend.options_class(options), transport.Options)


def measure_transport(choice: Choice) -> LinkSpeed:
    """Measure the transport of a selection. Raises ``ConfigError`` where it cannot serve a worker."""
    transport = registry.load(registry.TRANSPORTS, choice.selection.transport)
    if transport.ServeOptions is None:
        raise ConfigError(
            f"the {choice.selection.transport} transport cannot serve a worker to be measured with: plan without it"
        )
    return measure_link(choice.selection.transport, _options(choice)[2])


def _client_compute(
    model: str,
    planned: PlannedModel,
    targets: Sequence[str],
    tokens: int,
    length: int,
) -> ClientCompute:
    """Measure what a client computes itself; guess where the model cannot be cut to a few blocks and run on tokens."""
    cut = small_model(model, planned, use_cache=False)
    if cut is None:
        return guess_client_compute(planned)
    small, chosen, share = cut
    found = measure_client_compute(small, chosen, planned.choice.options, targets, tokens, length)
    needed = {product_name(u.layers, d) for u in planned.groups for d in DIRECTIONS[: 1 + u.backward] if not u.lookup}
    if not needed <= found.before.keys():
        return guess_client_compute(planned)  # Blocks are not all alike.
    blocks = getattr(planned.model.config, "num_hidden_layers", 0)
    return dataclasses.replace(
        found,
        head=Line(found.head.fixed * share, found.head.per_token * share),
        optimizer=found.optimizer * max(1.0, blocks / BLOCKS),
    )


def small_model(
    model: str, planned: PlannedModel, *, use_cache: bool
) -> tuple[nn.Module, list[Candidate], float] | None:
    """Cut a causal language model to ``BLOCKS`` blocks and a smaller vocabulary.

    Returns:
        The small model without weights, its layers that are outsourced, and the whole model's vocabulary over its own;
        None where the model cannot be cut so.
    """
    whole = planned.model
    config = getattr(whole, "config", None)
    vocabulary, hidden = getattr(config, "vocab_size", None), getattr(config, "hidden_size", None)
    if not type(whole).__name__.endswith(("ForCausalLM", "LMHeadModel")) or not vocabulary or not hidden:
        return None
    most = max(256, min(vocabulary, _HEAD_WEIGHTS // hidden))
    changes = {"num_hidden_layers": BLOCKS, "vocab_size": most, "use_cache": use_cache}
    specials = ("pad_token_id", "bos_token_id", "eos_token_id")
    small = skeleton(model, **changes, **dict.fromkeys(specials))
    names = {candidate.name for candidate in planned.chosen}
    experts = planned.choice.options.experts
    chosen = choose_layers(small, "all", plugin_manager(), allow_meta=True, experts=experts)
    chosen = [candidate for candidate in chosen if candidate.name in names]
    blocks = getattr(config, "num_hidden_layers", 0)
    if not chosen or (blocks > BLOCKS and len(chosen) >= len(names)):
        return None
    return small, chosen, vocabulary / most


def guess_client_compute(planned: PlannedModel) -> ClientCompute:
    """Guess: head and loss as three products with the weights that stay, and a tenth of the plain products besides."""
    rate = _plain_rate()
    names = {candidate.name for candidate in planned.chosen}
    head = sum(c.weight().numel() for c in linear_layers(planned.model, allow_meta=True) if c.name not in names)
    before = {}
    for group in planned.groups:
        weights = group.forward.in_features * group.forward.out_features
        for direction in DIRECTIONS:
            before[product_name(group.layers, direction)] = Line(0.0, 0.2 * weights / rate)
    none = Line(0.0, 0.0)
    return ClientCompute(False, before, none, Line(0.0, 6 * head / rate), none, 0.0)


def _plain_rate() -> float:
    """Floating-point operations a second of a float32 product."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds)
