"""Plan of generation with an outsourced model: round trips, bytes and seconds of a pass."""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ciphertune._support.environment import machine
from ciphertune.bundle.placement import Placement
from ciphertune.errors import ConfigError
from ciphertune.outsourcing.layers import Candidate
from ciphertune.planning.client_compute import InstantSession, attach_instant_session
from ciphertune.planning.estimate import Estimate, estimate_step
from ciphertune.planning.measure import (
    guess_client_compute,
    local_selection,
    measure_copy,
    measure_products,
    measure_transport,
    sizes_to_measure,
    small_model,
)
from ciphertune.planning.placing import candidates, compare, to_measure
from ciphertune.planning.products import PlannedGroup, PlannedModel, Products
from ciphertune.planning.simulation import Network, Processors
from ciphertune.planning.speeds import ClientCompute, Line, Speeds, check_backend, product_name
from ciphertune.selection import SessionOptions

_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """Costs of generating text with an outsourced model; made by ``plan_generation``.

    A pass is one call of the model: the prompt is one, and each later one takes the last token of every sequence, with
    what was drafted behind it.

    Attributes:
        to, sequences, prompt_tokens, new_tokens, drafted, accepted, workers, placement: of the plan.
        round_trips: of a pass, one after the other: one a group of layers.
        requests: of a pass; more than round trips where several workers hold parts of a layer.
        bytes_up, bytes_down: of a pass.
        bytes_per_token: up and down, for each new token.
        prompt_bytes_up, prompt_bytes_down: of the pass over the prompts, and over what is drafted behind them.
        latency_seconds: of a pass, that no speed of any machine shortens.
        network_seconds: of a pass: latency, and its bytes at the bandwidth.
        most_tokens_per_second: of all sequences together, if everything but the network took no time.
        first_token_seconds: of the pass over the prompts; None without speeds.
        pass_seconds: of a later pass, drafting included; None without speeds.
        tokens_per_second: of all sequences together, after the first token; None without speeds.
        total_seconds: of all new tokens; None without speeds.
        path: the seconds of a later pass by what they are spent on, as in ``Estimate``; None without speeds.
        client_compute_measured: whether what the client computes was measured, and is not a guess.
        refused: as of ``ciphertune.planning.plan.Plan``.
        speeds: of this machine, where they were measured.
    """

    to: str
    sequences: int
    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted: float
    workers: int
    placement: str
    round_trips: int
    requests: int
    bytes_up: int
    bytes_down: int
    bytes_per_token: float
    prompt_bytes_up: int
    prompt_bytes_down: int
    latency_seconds: float
    network_seconds: float
    most_tokens_per_second: float
    first_token_seconds: float | None
    pass_seconds: float | None
    tokens_per_second: float | None
    total_seconds: float | None
    path: dict[str, float] | None
    client_compute_measured: bool
    refused: dict[str, str]
    speeds: Speeds | None


def plan_generation(
    model: str,
    to: str = "mlwe",
    *,
    sequences: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    drafted: int = 0,
    accepted: float | None = None,
    draft_seconds: float = 0.0,
    layers: Sequence[str] | str | None = None,
    embeddings: bool = False,
    bandwidth: float = 125e6,
    down: float | None = None,
    latency: float = 1e-3,
    workers: int = 1,
    placement: Placement | str | None = None,
    worker_memory: float | None = None,
    processors: Processors = "own",
    measure: bool = True,
    client: Speeds | None = None,
    worker: Speeds | None = None,
) -> GenerationPlan:
    """Plan generation with a key-value cache. No weight is loaded.

    Args:
        model: a folder with a ``config.json``, a hub name, or one of ``ciphertune.models.known.BUILT_IN``.
        to: selection string; its endpoints are not asked.
        sequences: generated at once, in one batch.
        prompt_tokens: of each prompt.
        new_tokens: of each sequence.
        drafted: tokens that prompt lookup or a draft model at the client proposes for each pass, which verifies them.
        accepted: tokens of a sequence that a pass yields on average, from 1 to ``drafted`` + 1; it depends on the text,
            so it is to be stated where tokens are drafted.
        draft_seconds: that the client takes for each drafted token of a pass.
        layers: which layers; those that are left out are computed at the client, and make no round trip.
        embeddings: whether tokens are looked up at the workers.
        bandwidth: bytes a second that the client's network card sends, and each worker's both ways.
        down: bytes a second that the client's card receives; as it sends if None.
        latency: seconds one way.
        workers: how many.
        placement: as of ``ciphertune.planning.plan.make_plan``; the fastest is that of a later pass.
        worker_memory: bytes of weights that a worker may hold.
        processors: who shares one; see ``ciphertune.planning.simulation.Processors``.
        measure: take some seconds to measure this machine where ``client`` or ``worker`` is not given.
        client: speeds of the machine that will be the client; this machine's if None.
        worker: the same for workers.

    Raises:
        ConfigError: the model's configuration cannot be read, or an argument is wrong.
        SelectionError, LayerError: about ``to`` and ``layers``.
    """
    down_rate = bandwidth if down is None else down
    counts, rates = min(sequences, prompt_tokens, new_tokens, workers), min(bandwidth, down_rate)
    if counts < 1 or rates <= 0 or latency < 0 or drafted < 0:
        raise ConfigError("sequences, tokens, bandwidth and workers must be above 0, and latency not below")
    if drafted and accepted is None:
        raise ConfigError(
            f"how many of {drafted} drafted tokens are right depends on the text: state the tokens that a pass yields "
            f"on average, from 1 to {drafted + 1}, with --accepted"
        )
    accepted = 1.0 if accepted is None else accepted
    if not 1.0 <= accepted <= drafted + 1:
        raise ConfigError(f"a pass over {drafted} drafted tokens yields from 1 to {drafted + 1}, not {accepted:g}")
    products = Products(model, to, layers, (), embeddings)
    whole = products.placed(Placement())
    fit = candidates(products, workers, placement, worker_memory)
    placed, planned = fit[0]
    backend = planned.choice.backend
    check_backend(client, worker, local_selection(planned.choice))
    head, width = output_head(planned.model), sequences * (1 + drafted)
    prompted = sequences * (prompt_tokens + drafted)

    def traffic(groups: Sequence[PlannedGroup], tokens: int) -> list[tuple[int, int]]:
        return [
            sent
            for group in groups
            for direction in group.directions
            for part in group.parts(tokens)
            for sent in group.traffic(direction, backend, part)
        ]

    speeds = None
    if measure and planned.groups and (client is None or worker is None):
        parts = to_measure(whole, planned)
        speeds = measure_generation(model, parts, (width, prompted), sequences, client is None)
    client, worker = client or speeds, worker or speeds
    network = Network(bandwidth, latency, processors=processors, down=down)
    first: Estimate | None = None
    later: Estimate | None = None
    if planned.groups and client is not None and worker is not None:
        of_client, of_worker = forward_only(client), worker

        def later_pass(model: PlannedModel, placed: Placement, at_once: int = 1) -> Estimate:
            groups = forward_groups(model)
            return estimate_step(groups, backend, [width], at_once, placed.workers, network, of_client, of_worker)

        if len(fit) > 1:
            placed = Placement.read(compare(fit, later_pass, [1])[0].placement)
            planned = next(model for one, model in fit if one == placed)
        later = later_pass(planned, placed)
        first = estimate_step(
            prompt_groups(planned, head, width),
            backend,
            [prompted],
            1,
            workers,
            network,
            of_client,
            of_worker,
        )
    groups, prompts = forward_groups(planned), prompt_groups(planned, head, width)
    each, prompt = traffic(groups, width), traffic(prompts, prompted)
    bytes_up, bytes_down = (sum(column) for column in zip(*each, strict=True)) if each else (0, 0)
    prompt_up, prompt_down = (sum(column) for column in zip(*prompt, strict=True)) if prompt else (0, 0)
    waiting = 2 * latency * len(groups)
    network_seconds = waiting + bytes_up / bandwidth + bytes_down / down_rate
    seconds = None if later is None else later.total + drafted * draft_seconds
    rate = None if seconds is None else sequences * accepted / max(seconds, 1e-12)
    total = None
    if first is not None and rate is not None:
        total = first.total + sequences * (new_tokens - 1) / rate
    return GenerationPlan(
        to=str(planned.choice.selection),
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        drafted=drafted,
        accepted=accepted,
        workers=workers,
        placement=str(placed),
        round_trips=len(groups),
        requests=len(each),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        bytes_per_token=(bytes_up + bytes_down) / (sequences * accepted),
        prompt_bytes_up=prompt_up,
        prompt_bytes_down=prompt_down,
        latency_seconds=waiting,
        network_seconds=network_seconds,
        most_tokens_per_second=sequences * accepted / max(network_seconds, 1e-12),
        first_token_seconds=None if first is None else first.total,
        pass_seconds=seconds,
        tokens_per_second=rate,
        total_seconds=total,
        path=None if later is None else later.path,
        client_compute_measured=later is not None and later.client_compute_measured,
        refused=planned.refused,
        speeds=speeds,
    )


def output_head(model: nn.Module) -> str | None:
    """The last part of the name of a model's output head; None where it names none."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    names = (name for name, module in model.named_modules() if module is found)
    return None if found is None else next(names, "").rpartition(".")[2] or None


def forward_groups(planned: PlannedModel) -> list[PlannedGroup]:
    """Groups of a pass that asks for no gradient."""
    return [dataclasses.replace(group, backward=False) for group in planned.groups]


def prompt_groups(planned: PlannedModel, head: str | None, kept: int) -> list[PlannedGroup]:
    """Groups of a pass over prompts. ``kept`` tokens go through the head, or all where the model drops none."""
    groups = forward_groups(planned)
    if "logits_to_keep" not in inspect.signature(planned.model.forward).parameters:
        return groups
    return [dataclasses.replace(each, most=kept if each.layers == head else None) for each in groups]


def measure_generation(
    model: str,
    planned: PlannedModel,
    tokens: Sequence[int],
    sequences: int,
    as_client: bool,
) -> Speeds:
    """Measure this machine at passes over ``tokens``, the first of them a later pass, the second the prompts."""
    backend, to = planned.choice.backend, local_selection(planned.choice)
    sizes = [size for count in tokens for size in sizes_to_measure(planned, backend, count)]
    with torch.random.fork_rng(devices=[]):
        return Speeds(
            to=to,
            machine={name: str(value) for name, value in machine().items()} | {"torch": torch.__version__},
            products=measure_products(to, [size for size in dict.fromkeys(sizes) if size.direction == "forward"]),
            copy=measure_copy(),
            client_compute=_client_compute(model, planned, tokens, sequences) if as_client else None,
            link=measure_transport(planned.choice) if as_client and planned.choice.transport.remote else None,
        )


def _client_compute(
    model: str,
    planned: PlannedModel,
    tokens: Sequence[int],
    sequences: int,
) -> ClientCompute:
    found = small_model(model, planned, use_cache=True)
    if found is None:
        return _forward_compute(guess_client_compute(planned))
    small, chosen, head_share = found
    computed = _measure_passes(small, chosen, planned.choice.options, tokens, sequences, head_share)
    if (
        not {product_name(group.layers, "forward") for group in planned.groups if not group.lookup}
        <= computed.before.keys()
    ):
        return _forward_compute(guess_client_compute(planned))  # Blocks are not all alike.
    return computed


def _measure_passes(
    small: nn.Module,
    chosen: Sequence[Candidate],
    options: SessionOptions,
    tokens: Sequence[int],
    sequences: int,
    head_share: float,
) -> ClientCompute:
    """Run passes of a small model, whose products cost nothing, as generation does: cached, without gradients."""
    from transformers import DynamicCache

    session = attach_instant_session(small, chosen, options)
    model = small.eval()
    width, prompt = (max(1, count // sequences) for count in tokens)
    runs: dict[str, list[list[float]]] = {"later": [], "prompt": []}
    names: list[str] = []
    for _ in range(_ROUNDS + 1):
        cache = DynamicCache(config=small.config)
        marks = _pass(model, session, sequences, prompt, cache)
        runs["prompt"].append([seconds for _, seconds in marks])
        marks = _pass(model, session, sequences, width, cache)
        runs["later"].append([seconds for _, seconds in marks])
        names = [name for name, _ in marks]
    few, many = (
        [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
        for rounds in (runs["later"], runs["prompt"])
    )
    # The first product of all comes after the embeddings; the last mark is the head.
    lines = [_line(width * sequences, low, prompt * sequences, high) for low, high in zip(few, many, strict=True)]
    before: dict[str, Line] = {}
    for name, line in zip(names[1:-1], lines[1:-1], strict=True):
        before.setdefault(product_name(name, "forward"), line)
    before.setdefault(product_name(names[0], "forward"), lines[0])
    # The head of a prompt is that of its last tokens: as of a later pass, and the same for any number.
    return ClientCompute(True, before, lines[0], Line(few[-1] * head_share, 0.0), Line(0.0, 0.0), 0.0)


def _pass(model: Any, session: InstantSession, sequences: int, tokens: int, cache: Any) -> list[tuple[str, float]]:
    """Names of the products with the client's seconds before each, then the seconds after the last."""
    ids = torch.randint(int(getattr(model.config, "vocab_size", 2)), (sequences, tokens))
    # Releases of transformers call it by one name or the other.
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    last = {"logits_to_keep": 1} if cache.get_seq_length() == 0 else {}
    with torch.no_grad():
        session.begin()
        model(input_ids=ids, use_cache=True, **{keyword: cache}, **last).logits.argmax(-1)
        end = session.end()
    return [*((mark.layers, mark.seconds) for mark in session.marks), ("", end)]


def _line(few: int, low: float, many: int, high: float) -> Line:
    slope = max(0.0, (high - low) / (many - few)) if many != few else 0.0
    return Line(max(0.0, low - slope * few), slope)


def forward_only(speeds: Speeds) -> Speeds:
    """Speeds of a client without what only training computes, where they were measured for that."""
    computed = speeds.client_compute
    if computed is None or not any(name.endswith(" backward") for name in computed.before):
        return speeds
    return dataclasses.replace(speeds, client_compute=_forward_compute(computed))


def _forward_compute(computed: ClientCompute) -> ClientCompute:
    # Of a head's three products, one is forward.
    head = Line(computed.head.fixed / 3, computed.head.per_token / 3)
    return dataclasses.replace(computed, head=head, end=Line(0.0, 0.0), optimizer=0.0)
