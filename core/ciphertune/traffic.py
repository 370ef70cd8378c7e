"""Costs of one exchange with the workers, their totals, totals by layer, and costs before the first exchange."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass
class Traffic:
    """Totals over products.

    Attributes:
        requests: messages sent: one for every piece of a group that another worker holds.
        retries: messages sent again, because a worker failed or was late.
        bytes_up, bytes_down: buffer bytes sent and received, without those of retries.
        encrypt_seconds, wait_seconds, evaluate_seconds, decrypt_seconds: time by phase. Waiting covers the transport
            and the worker; evaluation is what the worker reports of it.
        turn_seconds: time in which other tasks computed while a product was under way (``ciphertune.interleave``). It
            is no part of ``wait_seconds``, which is time in which nothing was computed here.
    """

    requests: int = 0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    decrypt_seconds: float = 0.0
    turn_seconds: float = 0.0

    def add(self, other: Traffic) -> None:
        """Add the costs of an exchange, or other totals."""
        for name in COSTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, earlier: Traffic) -> Traffic:
        """The difference to an earlier copy."""
        return Traffic(**{name: getattr(self, name) - getattr(earlier, name) for name in COSTS})


@dataclasses.dataclass
class SetUp:
    """Costs of a session's preparations from the weights' codes: once, and again for pieces that a new worker needs.

    Attributes:
        weights: codes read.
        bytes_down: bytes of them that workers sent; 0 where the codes were at hand.
        seconds: time of reading, checking and preparing. It is no part of ``Traffic``.
    """

    weights: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


COSTS = tuple(field.name for field in dataclasses.fields(Traffic))
"""Names of what an exchange costs."""
SUMS = ("products", "tokens", *COSTS)
"""Names of what is added up by layer and direction."""


@dataclasses.dataclass(kw_only=True)
class Exchange(Traffic):
    """One product: what it was and, once answered, what it cost.

    Attributes:
        layers: names of the layers it serves.
        direction: forward or backward.
        tokens: rows of the input.
    """

    layers: tuple[str, ...]
    direction: Literal["forward", "backward"]
    tokens: int


class TrafficByLayer:
    """Totals of exchanges by layers and direction. Safe to use from several threads."""

    def __init__(self) -> None:
        self._rows: dict[tuple[tuple[str, ...], str], dict[str, float]] = {}
        self._adding = threading.Lock()

    def add(self, exchange: Exchange) -> None:
        """Count one exchange."""
        with self._adding:
            row = self._rows.setdefault((exchange.layers, exchange.direction), zero())
            add_to(row, {"products": 1, **dataclasses.asdict(exchange)})

    def rows(self) -> list[dict[str, Any]]:
        """One row for every group and direction: ``layers``, ``direction`` and ``SUMS``, the largest in bytes first."""
        with self._adding:
            rows = [{"layers": list(k[0]), "direction": k[1], **sums} for k, sums in self._rows.items()]
        return sorted(rows, key=lambda row: -(row["bytes_up"] + row["bytes_down"]))


def zero() -> dict[str, float]:
    """Sums of nothing."""
    return dict.fromkeys(SUMS, 0)


def add_to(sums: dict[str, float], more: Mapping[str, Any]) -> None:
    """Add another row's sums to these."""
    for name in sums:
        sums[name] += more[name]


def total(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The sums of rows."""
    sums = zero()
    for row in rows:
        add_to(sums, row)
    return sums


def by_kind(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Sums by kind of layer (``kind_of``) and direction, in the order in which they come first."""
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        directions = kinds.setdefault(kind_of(row["layers"]), {})
        add_to(directions.setdefault(row["direction"], zero()), row)
    return kinds


def kind_of(layers: Sequence[str]) -> str:
    """Layer names with their common part once and numbers left out.

    >>> kind_of(["h.0.attn.q", "h.0.attn.k"])
    'h.*.attn.{q,k}'
    >>> kind_of(["h.11.mlp.up"])
    'h.*.mlp.up'
    """
    paths = [re.sub(r"\d+", "*", layer).split(".") for layer in layers]
    same = 0
    while all(len(path) > same + 1 and path[same] == paths[0][same] for path in paths):
        same += 1
    tails = [".".join(path[same:]) for path in paths]
    return ".".join([*paths[0][:same], tails[0] if len(tails) == 1 else "{" + ",".join(tails) + "}"])
