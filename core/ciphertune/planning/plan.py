"""Plan of an outsourced model before anything runs: shares, traffic, and an estimate of a step's time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from ciphertune.backend import Backend
from ciphertune.bundle.placement import Placement, halved
from ciphertune.errors import ConfigError
from ciphertune.outsourcing.layers import linear_layers
from ciphertune.planning.estimate import Estimate, estimate_step
from ciphertune.planning.measure import local_selection, measure_preparing, measure_speeds
from ciphertune.planning.placing import Tried, candidates, compare, fits, to_measure
from ciphertune.planning.products import Patches, PlannedGroup, PlannedModel, Products, kept_parameters
from ciphertune.planning.shares import shares_of
from ciphertune.planning.simulation import Network, Processors
from ciphertune.planning.speeds import Speeds, check_backend

# A b is a bit and a B a byte, whatever stands around it; prefixes in either case.
_RATE = re.compile(r"([0-9.]+)\s*([kKmMgGtT]?)(bits?|b|bytes?|B)(?:/s(?:ec)?|ps)\Z")
_TIME = re.compile(r"([0-9.]+)\s*(us|µs|ms|msec|s|sec|seconds?|milliseconds?)\Z")
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNIT = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0}
_BITS = ("b", "bit", "bits")


def bytes_per_second(text: str) -> float:
    """Read a bandwidth, in bytes a second.

    >>> bytes_per_second("1Gbit/s"), bytes_per_second("10 MB/s"), bytes_per_second("50 Mbps")
    (125000000.0, 10000000.0, 6250000.0)

    Raises:
        ConfigError: it is not a number with a unit.
    """
    found = _RATE.match(text.strip())
    value = _number(found[1]) if found else 0.0
    if found is None or value <= 0:
        raise ConfigError(f"cannot read the bandwidth {text!r}: write for example 50 Mbit/s, 1Gbit/s or 10MB/s")
    return value * _PREFIX[found[2].upper().replace("K", "k")] / (8 if found[3] in _BITS else 1)


def seconds(text: str) -> float:
    """Read a time, in seconds.

    >>> seconds("5ms"), seconds("0.5 s")
    (0.005, 0.5)

    Raises:
        ConfigError: it is not a number with a unit.
    """
    found = _TIME.match(text.strip())
    if found is None:
        raise ConfigError(f"cannot read the time {text!r}: write for example 5ms or 0.2s")
    return _number(found[1]) * _UNIT[found[2] if found[2] in _UNIT else found[2].removesuffix("s")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None


@dataclasses.dataclass
class Kind:
    """Groups of layers of the same names and sizes.

    Attributes:
        layers: their last names, joined by +.
        in_features, out_features: K and N, of siblings together.
        count: groups of this kind in the model.
        requests: of a step.
        bytes_up, bytes_down: of a step.
        tied: whether the weights are those of another kind, as a lookup's are in the table of the output head.
    """

    layers: str
    in_features: int
    out_features: int
    tied: bool = False
    count: int = 0
    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def weights(self) -> int:
        """Number of weights of all groups of this kind; 0 where they are another kind's."""
        return 0 if self.tied else self.codes

    @property
    def codes(self) -> int:
        """Number of weights that products of this kind are made with."""
        return self.count * self.in_features * self.out_features


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Costs of one evaluation on held-out data.

    Attributes:
        bytes_up, bytes_down: of its requests and replies.
        seconds: None without speeds.
    """

    bytes_up: int
    bytes_down: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Later:
    """Costs once the outputs of the blocks below the first adapter are kept (``frozen_cache``).

    Attributes:
        bytes_up, bytes_down: of a step.
        seconds: of a step; None without speeds.
        evaluation: of held-out data; None where none was asked for.
        kept_bytes: on disk, of one token.
    """

    bytes_up: int
    bytes_down: int
    seconds: float | None
    evaluation: Evaluation | None
    kept_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Costs of a training step of an outsourced model; made by ``make_plan``.

    Attributes:
        to, tokens, pictures, micro_batches, interleave, workers, placement: of the plan; a step of pictures has as many
            tokens; placement and interleave are the fastest
            where none was asked for.
        tried: placements that were compared, the chosen one first; nothing where one was asked for, or without speeds.
        fewer: the best placement of each smaller number of workers that can hold the weights, by halves; likewise.
        kinds: what is outsourced.
        requests, bytes_up, bytes_down: of a step.
        bytes_without_sharing: up and down, if siblings did not share their input.
        outsourced, at_client: weights.
        largest_fraction: outsourced weights over all if the output head and the token embedding were outsourced, too.
        client_bytes: of the weights that stay, as the model stores them.
        worker_bytes: of the weights that the fullest worker holds.
        prepared_codes: weights that the client reads before the first step, unless what it makes of them is on disk.
        prepared_bytes: memory of the client for what it makes of them.
        set_up_bytes: that a client without the whole model reads from workers to prepare itself, once a model.
        set_up_seconds: of reading them and preparing; None where this was not measured here.
        evaluation: of held-out data; None where none was asked for.
        later: of steps and evaluations of examples that came before; None where nothing lies below the first adapter.
        stays: layers that stay and why, by name.
        refused: layers, or groups of them, that the backend cannot evaluate, and why: outsourcing stops at them. The
            other figures are of the rest.
        estimate: None without speeds, or where nothing is outsourced.
        speeds: of this machine, where they were measured.
    """

    to: str
    tokens: int
    pictures: int | None
    micro_batches: int
    interleave: int
    workers: int
    placement: str
    tried: tuple[Tried, ...]
    fewer: tuple[Tried, ...]
    kinds: tuple[Kind, ...]
    requests: int
    bytes_up: int
    bytes_down: int
    bytes_without_sharing: int
    outsourced: int
    at_client: int
    largest_fraction: float
    client_bytes: int
    worker_bytes: int
    prepared_codes: int
    prepared_bytes: int
    set_up_bytes: int
    set_up_seconds: float | None
    evaluation: Evaluation | None
    later: Later | None
    stays: dict[str, str]
    refused: dict[str, str]
    estimate: Estimate | None
    speeds: Speeds | None

    @property
    def fraction(self) -> float:
        """Outsourced weights over all."""
        return self.outsourced / max(self.outsourced + self.at_client, 1)


def make_plan(
    model: str,
    to: str = "mlwe",
    *,
    tokens: int = 1024,
    layers: Sequence[str] | str | None = None,
    embeddings: bool = False,
    convolutions: bool | Sequence[str] = False,
    pictures: int | None = None,
    picture_size: int | None = None,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    first_block: int = 0,
    bandwidth: float = 125e6,
    down: float | None = None,
    latency: float = 1e-3,
    workers: int = 1,
    placement: Placement | str | None = None,
    worker_memory: float | None = None,
    micro_batches: int = 1,
    interleave: int | None = 1,
    length: int = 256,
    processors: Processors = "own",
    measure: bool = True,
    client: Speeds | None = None,
    worker: Speeds | None = None,
    evaluation: Sequence[int] = (),
) -> Plan:
    """Plan a training step of an outsourced model. No weight is loaded.

    Args:
        model: a folder with a ``config.json`` (a client's part of a bundle has one), a hub name, or one of
            ``ciphertune.models.known.BUILT_IN``.
        to: selection string; its endpoints are not asked. If it names a transport that leaves this process, what that
            costs is measured, too.
        tokens: of a step.
        layers: which layers; see ``ciphertune.outsourcing.layers.choose_layers``.
        embeddings: whether the token embedding is outsourced, too; see ``ciphertune.outsource``.
        convolutions: which are outsourced, too; see ``ciphertune.outsource``. In a model of texts, their patches are
            those of sequences of ``length``.
        pictures: of a step, in place of tokens: the rows of every layer are those of one picture.
        picture_size: pixels of each side; what the model's configuration says if None.
        targets: ends of names of the layers with adapters, or of modules that are trained: no gradient is asked for
            before the first of them.
        first_block: number of the first transformer block with adapters.
        bandwidth: bytes a second that the client's network card sends, and each worker's.
        down: bytes a second that the client's receives; as ``bandwidth`` if None.
        latency: seconds one way.
        workers: how many.
        placement: how the model is split over them; see ``ciphertune.bundle.placement.Placement.read``. If None, all
            are compared and the fastest is planned; without speeds, rows of every layer at each.
        worker_memory: bytes of weights that a worker may hold; placements that need more are not compared.
        micro_batches: that a step's tokens are divided into.
        interleave: micro-batches under way at once; the fastest number if None.
        length: tokens of a sequence, for the client's attention.
        processors: who shares one; see ``ciphertune.planning.simulation.Processors``.
        measure: take some seconds to measure this machine where ``client`` or ``worker`` is not given.
        client: speeds of the machine that will be the client; this machine's if None.
        worker: the same for workers.
        evaluation: tokens of each batch of an evaluation on held-out data; nothing for none.

    Raises:
        ConfigError: the model's configuration cannot be read, or an argument is wrong.
        SelectionError, LayerError: about ``to``, ``layers`` and ``embeddings``.
    """
    down = bandwidth if down is None else down
    tokens = tokens if pictures is None else pictures
    if picture_size is not None and (pictures is None or picture_size < 1):
        raise ConfigError("a size of pictures is above 0, and needs the number of pictures of a step")
    if tokens < 1 or bandwidth <= 0 or down <= 0 or latency < 0 or workers < 1 or length < 1:
        raise ConfigError("tokens, length, bandwidth and workers must be above 0, and latency not below")
    if not 1 <= micro_batches <= tokens:
        raise ConfigError(f"{tokens} tokens cannot be divided into {micro_batches} micro-batches")
    if interleave is not None and not 1 <= interleave <= micro_batches:
        raise ConfigError(f"interleave={interleave} must be between 1 and the number of micro-batches, {micro_batches}")
    patched = convolutions if isinstance(convolutions, bool) else tuple(convolutions)
    patches = Patches(patched, length, pictures is not None, picture_size)
    products = Products(model, to, layers, targets, embeddings, first_block, patches)
    whole = products.placed(Placement())
    fit = candidates(products, workers, placement, worker_memory)
    placed, planned = fit[0]
    backend = planned.choice.backend
    sizes = [tokens // micro_batches + (i < tokens % micro_batches) for i in range(micro_batches)]
    local = local_selection(planned.choice)
    check_backend(client, worker, local)
    speeds, preparing = None, None
    if measure and planned.groups and client is None and backend.prepares:
        preparing = measure_preparing(local)
    if measure and planned.groups and (client is None or worker is None):
        parts = to_measure(whole, planned)
        speeds = measure_speeds(model, parts, targets, max(sizes), length, as_client=client is None)
    client, worker = client or speeds, worker or speeds
    network, estimate = Network(bandwidth, latency, processors=processors, down=down), None
    tried: list[Tried] = []
    fewer: list[Tried] = []
    if planned.groups and client is not None and worker is not None:
        of_client, of_worker = client, worker

        def estimates(model: PlannedModel, placed: Placement, at_once: int) -> Estimate:
            return estimate_step(model.groups, backend, sizes, at_once, placed.workers, network, of_client, of_worker)

        at_once = [interleave] if interleave is not None else [n for n in (1, 2, 4) if n <= micro_batches]
        if len(fit) > 1 or len(at_once) > 1:
            tried = compare(fit, estimates, at_once)
            placed, interleave = Placement.read(tried[0].placement), tried[0].interleave
            planned = next(model for one, model in fit if one == placed)
        if placement is None:
            for count in halved(workers)[:-1]:
                fitted = fits(products, count, worker_memory)
                fewer += compare(fitted, estimates, at_once)[:1] if fitted else []
        estimate = estimates(planned, placed, interleave or 1)
    interleave = interleave or 1
    shared, alone = _kinds(planned.groups, backend, sizes), _kinds(planned.singles, backend, sizes)

    def evaluating(groups: Sequence[PlannedGroup]) -> Evaluation | None:
        if not evaluation:
            return None
        ahead = [dataclasses.replace(group, backward=False) for group in groups]
        once, took = _kinds(ahead, backend, evaluation), None
        if estimate is not None and client is not None and worker is not None:
            times = {
                size: estimate_step(ahead, backend, [size], 1, workers, network, client, worker).total
                for size in set(evaluation)
            }
            took = sum(times[size] for size in evaluation)
        return Evaluation(sum(kind.bytes_up for kind in once), sum(kind.bytes_down for kind in once), took)

    later = None
    above = [group for group in planned.groups if not group.below]
    if above and len(above) < len(planned.groups):
        again, took = _kinds(above, backend, sizes), None
        if estimate is not None and client is not None and worker is not None:
            took = estimate_step(above, backend, sizes, interleave, placed.workers, network, client, worker).total
        later = Later(
            sum(kind.bytes_up for kind in again),
            sum(kind.bytes_down for kind in again),
            took,
            evaluating(above),
            4 * above[0].forward.in_features,
        )
    kept = kept_parameters(planned)
    codes = sum(kind.codes for kind in shared) if backend.prepares else 0
    read = codes * (backend.weight_bits or 32) // 8
    return Plan(
        to=str(planned.choice.selection),
        tokens=tokens,
        pictures=pictures,
        micro_batches=micro_batches,
        interleave=interleave,
        workers=workers,
        placement=str(placed),
        tried=tuple(tried),
        fewer=tuple(fewer),
        kinds=tuple(shared),
        requests=sum(kind.requests for kind in shared),
        bytes_up=sum(kind.bytes_up for kind in shared),
        bytes_down=sum(kind.bytes_down for kind in shared),
        bytes_without_sharing=sum(kind.bytes_up + kind.bytes_down for kind in alone),
        outsourced=sum(kind.weights for kind in shared),
        at_client=sum(p.numel() for p in kept),
        largest_fraction=shares_of(planned.model).largest,
        client_bytes=sum(p.nbytes for p in kept),
        worker_bytes=planned.worker_bytes,
        prepared_codes=codes,
        prepared_bytes=sum(
            backend.kept_bytes(None if group.lookup else group.forward, group.whole_backward)
            for group in planned.groups
        ),
        set_up_bytes=read,
        set_up_seconds=None if preparing is None else read / down + codes * preparing,
        evaluation=evaluating(planned.groups),
        later=later,
        stays={
            c.name: c.obstacle or c.stays or "it was not chosen"
            for c in linear_layers(planned.model, allow_meta=True, experts=planned.choice.options.experts)
            if c.name not in planned.named
        },
        refused=planned.refused,
        estimate=estimate,
        speeds=speeds,
    )


def _kinds(groups: Sequence[PlannedGroup], backend: Backend, sizes: Sequence[int]) -> list[Kind]:
    kinds: dict[tuple[str, int, int], Kind] = {}
    for group in groups:
        key = (group.layers, group.forward.in_features, group.forward.out_features)
        kind = kinds.setdefault(key, Kind(*key, tied=group.tied))
        kind.count += 1
        parts = [part for tokens in sizes for part in group.parts(tokens)]
        for direction in group.directions:
            for up, down in (pair for tokens in parts for pair in group.traffic(direction, backend, tokens)):
                kind.requests += 1
                kind.bytes_up += up
                kind.bytes_down += down
    return list(kinds.values())
