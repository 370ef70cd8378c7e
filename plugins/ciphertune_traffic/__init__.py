"""Where the bytes and the seconds of a run went: by layers and direction."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciphertune import hookimpl

if TYPE_CHECKING:
    from ciphertune import Exchange

_SUMS = (
    *("tokens", "requests", "retries", "bytes_up", "bytes_down"),
    *("encrypt_seconds", "wait_seconds", "evaluate_seconds", "decrypt_seconds"),
)


@dataclasses.dataclass(frozen=True)
class TrafficOptions:
    """Options of the traffic plugin.

    Attributes:
        path: a JSON file to write, with a row for every unit and direction, instead of a table on the terminal.
    """

    path: Path | None = None


class Traffic:
    """Adds up what replies cost from its first use on, over all sessions, and reports it at the end of training.

    Without a trainer it reports when a session is closed. The table is for standard error, where that is a terminal;
    layers whose names differ in numbers alone share a row of it.
    """

    Options = TrafficOptions

    def __init__(self, options: TrafficOptions) -> None:
        self.path = options.path
        self._rows: dict[tuple[tuple[str, ...], str], dict[str, float]] = {}
        self._adding = threading.Lock()
        self._news = False

    @hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        """Count it."""
        with self._adding:
            row = self._rows.setdefault((exchange.layers, exchange.direction), dict.fromkeys(("products", *_SUMS), 0))
            _add(row, {"products": 1, **{name: getattr(exchange, name) for name in _SUMS}})
            self._news = True

    @hookimpl(trylast=True)  # a progress bar has left the terminal then
    def ciphertune_training_end(self) -> None:
        """Report."""
        self._report()

    @hookimpl
    def ciphertune_session_closed(self) -> None:
        """Report what came after."""
        self._report()

    def close(self) -> None:
        """Report what came after."""
        self._report()

    def rows(self) -> list[dict[str, Any]]:
        """One entry for every unit and direction: its layers, and sums named as in ``Exchange``; the largest first."""
        with self._adding:
            rows = [{"layers": list(k[0]), "direction": k[1], **sums} for k, sums in self._rows.items()]
        return sorted(rows, key=lambda row: -(row["bytes_up"] + row["bytes_down"]))

    def _report(self) -> None:
        with self._adding:
            news, self._news = self._news, False
        if not news:
            return
        if self.path is not None:
            from ciphertune.trainer.atomic import replace_file

            rows = self.rows()
            total = dict.fromkeys(("products", *_SUMS), 0.0)
            for row in rows:
                _add(total, row)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps({"total": total, "units": rows}, indent=2).encode())
        elif sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(_table(self.rows()))


def _add(sums: dict[str, float], more: Mapping[str, Any]) -> None:
    for name in sums:
        sums[name] += more[name]


def _kind(layers: list[str]) -> str:
    """Layer names with their common part once and numbers left out.

    >>> _kind(["h.0.attn.q", "h.0.attn.k"])
    'h.*.attn.{q,k}'
    >>> _kind(["h.11.mlp.up"])
    'h.*.mlp.up'
    """
    paths = [re.sub(r"\d+", "*", layer).split(".") for layer in layers]
    same = 0
    while all(len(path) > same + 1 and path[same] == paths[0][same] for path in paths):
        same += 1
    tails = [".".join(path[same:]) for path in paths]
    return ".".join([*paths[0][:same], tails[0] if len(tails) == 1 else "{" + ",".join(tails) + "}"])


def _table(rows: list[dict[str, Any]]) -> str:
    """Narrow enough for 80 columns: layers on lines of their own."""
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    total = dict.fromkeys(("products", *_SUMS), 0.0)
    for row in rows:
        directions = kinds.setdefault(_kind(row["layers"]), {})
        for sums in (total, directions.setdefault(row["direction"], dict.fromkeys(total, 0.0))):
            _add(sums, row)
    lines = [["traffic", "requests", "retries", "tokens", "MB up", "MB down", "own s", "wait s", "eval s"]]
    for kind, directions in kinds.items():
        lines.append([kind])
        lines += [["  " + direction, *_cells(sums)] for direction, sums in directions.items()]
    lines.append(["all", *_cells(total)])
    widths = [max(len(line[n]) for line in lines if len(line) > 1) for n in range(len(lines[0]))]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False))]
        for line in lines
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in padded) + "\n"


def _cells(sums: Mapping[str, float]) -> list[str]:
    return [
        *(f"{sums[name]:.0f}" for name in ("requests", "retries", "tokens")),
        *(f"{sums[name] / 1e6:.1f}" for name in ("bytes_up", "bytes_down")),
        f"{sums['encrypt_seconds'] + sums['decrypt_seconds']:.2f}",
        *(f"{sums[name]:.2f}" for name in ("wait_seconds", "evaluate_seconds")),
    ]
