"""What replies cost, by layers and direction."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ciphertune.session import Exchange

SUMS = (
    *("tokens", "requests", "retries", "bytes_up", "bytes_down"),
    *("encrypt_seconds", "wait_seconds", "evaluate_seconds", "decrypt_seconds", "turn_seconds"),
)
"""What is added up, named as in ``Exchange``."""


class Ledger:
    """Sums over exchanges. Safe to use from several threads."""

    def __init__(self) -> None:
        self._rows: dict[tuple[tuple[str, ...], str], dict[str, float]] = {}
        self._adding = threading.Lock()

    def add(self, exchange: Exchange) -> None:
        """Count one."""
        with self._adding:
            row = self._rows.setdefault((exchange.layers, exchange.direction), zero())
            add_to(row, {"products": 1, **{name: getattr(exchange, name) for name in SUMS}})

    def rows(self) -> list[dict[str, Any]]:
        """One entry for every unit and direction: ``layers``, ``direction``, ``products`` and ``SUMS``.

        The largest in bytes come first.
        """
        with self._adding:
            rows = [{"layers": list(k[0]), "direction": k[1], **sums} for k, sums in self._rows.items()]
        return sorted(rows, key=lambda row: -(row["bytes_up"] + row["bytes_down"]))


def zero() -> dict[str, float]:
    """Sums of nothing."""
    return dict.fromkeys(("products", *SUMS), 0)


def add_to(sums: dict[str, float], more: Mapping[str, Any]) -> None:
    """Add another row's sums."""
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
