"""Estimate of a planned training step: seconds from measured speeds and a model of what waits for what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ciphertune.backend import Backend, Direction, LinearMap
from ciphertune.errors import ConfigError
from ciphertune.planning.products import PlannedGroup
from ciphertune.planning.simulation import (
    MicroBatch,
    Network,
    Processors,
    Product,
    Request,
    Timeline,
    What,
    simulate,
)
from ciphertune.planning.speeds import ClientCompute, Phase, Speeds, product_name

CHART_BINS = 60
_CHART_PRODUCTS = 6
_AFTER: tuple[Phase, ...] = ("evaluate", "decrypt")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one training step.

    Attributes:
        encrypt, decrypt, rest: of the client; ``encrypt`` counts what is computed ahead of the data, ``rest`` is
            what it computes itself: attention, output head, adapters, optimizer.
        evaluate: of all workers together.
        network: of messages, one after the other.
        total: of the step, with what is done at the same time.
        path: the step's seconds by what they are spent on: whoever waits, waits for this. They add up to ``total``.
        busy: how much of the step ``client``, ``uplink``, ``downlink``, the ``busiest worker`` and the ``mean worker``
            are at work.
        client_compute_measured: whether ``rest`` was measured with the model's own blocks, and is not a guess.
        link_measured: whether what the transport costs is counted.
        chart: how busy each is over ``chart_seconds`` from ``chart_start``, in equal parts, 0 to 1.
        chart_start, chart_seconds: a few products in the first half of the step.
    """

    encrypt: float
    evaluate: float
    decrypt: float
    network: float
    rest: float
    total: float
    path: dict[str, float]
    busy: dict[str, float]
    client_compute_measured: bool
    link_measured: bool
    chart: dict[str, list[float]]
    chart_start: float
    chart_seconds: float

    @property
    def limit(self) -> str:
        """Largest use of the step's time: ``crypto`` at the client, ``rest``, ``evaluate`` or ``network``."""
        parts = {
            "crypto": self.path["crypto"],
            "rest": self.path["rest"],
            "evaluate": self.path["evaluate"],
            "network": sum(self.path[part] for part in ("uplink", "downlink", "latency")),
        }
        return max(parts, key=parts.__getitem__)

    @property
    def bottleneck(self) -> str:
        """The largest entry of ``path``."""
        return max(self.path, key=self.path.__getitem__)


def estimate_step(
    groups: Sequence[PlannedGroup],
    backend: Backend,
    micro_batches: Sequence[int],
    interleave: int,
    workers: int,
    network: Network,
    client: Speeds,
    worker: Speeds,
) -> Estimate:
    """Estimate the seconds of a step.

    What the client computes ahead of the data takes time in which it would be idle, and prolongs the step by the rest.

    Args:
        groups: in the model's order.
        backend: whose ``work`` scales what was measured.
        micro_batches: tokens of each.
        interleave: of them at once.
        workers: how many.
        network: bandwidth and latency; what the transport adds is taken from ``client.link``.
        client: speeds of the client.
        worker: speeds of each worker.

    Raises:
        ConfigError: ``client`` was measured without the client's own computation, or with another model.
    """
    if client.client_compute is None:
        raise ConfigError(
            "the client's speeds lack its own computation: measure them on the client, with the same model"
        )
    if client.link is not None:
        link = client.link
        network = dataclasses.replace(network, rate=link.rate, overhead=link.overhead, client_rate=link.client_rate)
    computed = client.client_compute
    costs = Costs(backend, client, worker, computed)
    batches = {tokens: costs.micro_batch(groups, tokens) for tokens in set(micro_batches)}
    timeline = simulate([batches[t] for t in micro_batches], interleave, workers, network, computed.optimizer)
    products = [product for t in micro_batches for product in batches[t].products]
    return _estimate(timeline, workers, client, products, network.processors)


class Costs:
    """Seconds of products, from measured speeds."""

    def __init__(self, backend: Backend, client: Speeds, worker: Speeds, compute: ClientCompute) -> None:
        self._backend = backend
        self._client = client
        self._worker = worker
        self._compute = compute
        self._known: dict[tuple[Phase, Direction, int, int, int], float] = {}

    def micro_batch(self, groups: Sequence[PlannedGroup], tokens: int) -> MicroBatch:
        """Forward through all groups, and backward through those that need it."""
        back = [group for group in reversed(groups) if group.backward]
        compute = self._compute
        # Without a backward product, what is computed backward comes at the end.
        end = compute.end.at(tokens) + (0.0 if back else compute.head.at(tokens))
        return MicroBatch(
            [
                *(
                    self._forward(group, part, first=i == j == 0)
                    for i, group in enumerate(groups)
                    for j, part in enumerate(group.parts(tokens))
                ),
                *(
                    self._backward(group, part, first=i == j == 0)
                    for i, group in enumerate(back)
                    for j, part in enumerate(group.parts(tokens))
                ),
            ],
            end,
        )

    def _forward(self, group: PlannedGroup, tokens: int, first: bool) -> Product:
        rest = self._compute.begin.at(tokens) if first else self._before(group, "forward", tokens)
        if group.lookup:
            return self._product(rest, group, "backward", tokens)
        if group.cut:
            rest += group.forward.out_features * tokens * self._client.copy
        return self._product(rest, group, group.directions[0], tokens)

    def _backward(self, group: PlannedGroup, tokens: int, first: bool) -> Product:
        rest = self._compute.head.at(tokens) if first else self._before(group, "backward", tokens)
        if group.cut:
            added = (len(group.pieces) - 1) * group.forward.in_features
            rest += (group.forward.out_features + added) * tokens * self._client.copy
        return self._product(rest, group, group.directions[-1], tokens)

    def _product(self, rest: float, group: PlannedGroup, direction: Direction, tokens: int) -> Product:
        # As much for either direction, and for a product in pieces as for the whole.
        ahead = self._seconds("ahead", group.forward, tokens)
        return Product(rest, self._requests(group, direction, tokens), ahead)

    def _requests(self, group: PlannedGroup, direction: Direction, tokens: int) -> tuple[Request, ...]:
        requests: list[Request] = []
        for piece, (up, down) in zip(group.pieces, group.traffic(direction, self._backend, tokens), strict=True):
            part = piece.map(direction)
            encrypt = self._seconds("encrypt", part if direction == "backward" else group.forward, tokens)
            if direction == "forward" and requests:
                encrypt = 0.0  # One ciphertext goes to all.
            evaluate, decrypt = (self._seconds(phase, part, tokens) for phase in _AFTER)
            requests.append(Request(piece.workers, encrypt, up, evaluate, down, decrypt))
        return tuple(requests)

    def _before(self, group: PlannedGroup, direction: Direction, tokens: int) -> float:
        if group.lookup:
            return 0.0  # Rows are looked up before all else.
        name = product_name(group.layers, direction)
        if name not in self._compute.before:
            known = ", ".join(self._compute.before) or "nothing"
            raise ConfigError(f"the client's speeds are of another model: they have {known}, and not {name}")
        return self._compute.before[name].at(tokens)

    def _seconds(self, phase: Phase, linear_map: LinearMap, tokens: int) -> float:
        key = phase, linear_map.direction, linear_map.in_features, linear_map.out_features, tokens
        if key not in self._known:
            speeds = self._worker if phase == "evaluate" else self._client
            self._known[key] = speeds.seconds(self._backend, phase, linear_map, tokens)
        return self._known[key]


def _estimate(
    timeline: Timeline, workers: int, client: Speeds, products: Sequence[Product], processors: Processors
) -> Estimate:
    spent = timeline.critical()
    busy = timeline.busy()

    def taken(*whats: What) -> float:
        return sum(seconds for (what, _), seconds in busy.items() if what in whats)

    ahead = sum(product.ahead for product in products)
    idle = timeline.seconds - taken("encrypt", "decrypt", "rest", *(("evaluate",) if processors == "one" else ()))
    total = timeline.seconds + (beyond := max(0.0, ahead - max(0.0, idle)))
    each = [busy.get(("evaluate", worker), 0.0) for worker in range(workers)]
    seconds = timeline.seconds * min(1.0, _CHART_PRODUCTS / max(len(products), 1))
    start = min(0.2 * timeline.seconds, timeline.seconds - seconds)
    rows = timeline.chart(start, start + seconds, CHART_BINS)
    client_row = [sum(values) for values in zip(rows["rest"], rows["encrypt"], rows["decrypt"], strict=True)]
    working = sum(1 for one in each if one) or 1
    return Estimate(
        encrypt=taken("encrypt") + ahead,
        evaluate=taken("evaluate"),
        decrypt=taken("decrypt"),
        network=taken("uplink", "downlink", "latency"),
        rest=taken("rest"),
        total=total,
        path={
            "crypto": spent["encrypt"] + spent["decrypt"] + beyond,
            **{what: spent[what] for what in ("rest", "evaluate", "uplink", "downlink", "latency")},
        },
        busy={
            "client": (taken("encrypt", "decrypt", "rest") + ahead) / total,
            "busiest worker": max(each) / total,
            "mean worker": sum(each) / workers / total,
            "uplink": min(1.0, taken("uplink") / total),
            "downlink": min(1.0, taken("downlink") / total),
        },
        client_compute_measured=client.client_compute is not None and client.client_compute.measured,
        link_measured=client.link is not None,
        chart={
            "client": client_row,
            "uplink": rows["uplink"],
            "workers": [value / working for value in rows["evaluate"]],
            "downlink": rows["downlink"],
        },
        chart_start=start,
        chart_seconds=seconds,
    )
