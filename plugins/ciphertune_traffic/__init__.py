"""Bytes and seconds of a run, by layers and direction, and of the set-up before it."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciphertune.hookspecs import hookimpl
from ciphertune.traffic import TrafficByLayer, by_kind, total

if TYPE_CHECKING:
    from ciphertune import Session
    from ciphertune.traffic import Exchange, SetUp


@dataclasses.dataclass(frozen=True)
class TrafficOptions:
    """Options of the traffic plugin.

    Attributes:
        path: a JSON file to write, with a row for every group and direction and the costs of set-ups, instead of a
            table on the terminal.
    """

    path: Path | None = None


class Traffic:
    """Adds up what replies cost from its first use on, over all sessions, and reports it at the end of training.

    Without a trainer it reports when a session is closed. The table is for standard error, where that is a terminal;
    layers whose names differ in numbers alone share a row of it.
    """

    interface = 1
    Options = TrafficOptions

    def __init__(self, options: TrafficOptions) -> None:
        self.path = options.path
        self._by_layer = TrafficByLayer()
        self._set_ups: list[SetUp] = []
        self._lock = threading.Lock()
        self._news = False

    @hookimpl
    def ciphertune_session_opened(self, session: Session) -> None:
        """Remember where the session counts its set-up; workers that join later add to it."""
        self._set_ups.append(session.set_up)

    @hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        """Count the exchange."""
        self._by_layer.add(exchange)
        self._news = True

    @hookimpl(trylast=True)  # a progress bar has left the terminal then
    def ciphertune_training_end(self) -> None:
        """Report the totals."""
        self._report()

    @hookimpl
    def ciphertune_session_closed(self) -> None:
        """Report what came after."""
        self._report()

    def close(self) -> None:
        """Report what came after."""
        self._report()

    def rows(self) -> list[dict[str, Any]]:
        """One row for every group and direction: its layers, and sums named as in ``Exchange``; the largest first."""
        return self._by_layer.rows()

    def set_up(self) -> dict[str, float]:
        """Sums over sessions, named as in ``ciphertune.traffic.SetUp``."""
        sums = {"weights": 0.0, "bytes_down": 0.0, "seconds": 0.0}
        for costs in self._set_ups:
            for name in sums:
                sums[name] += getattr(costs, name)
        return sums

    def _report(self) -> None:
        with self._lock:
            news, self._news = self._news, False
        if not news:
            return
        if self.path is not None:
            from ciphertune._support.atomic import replace_file

            rows = self.rows()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(
                self.path,
                json.dumps({"total": total(rows), "set_up": self.set_up(), "groups": rows}, indent=2).encode(),
            )
        elif sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(_table(self.rows()) + _set_up_line(self.set_up()))


def _table(rows: list[dict[str, Any]]) -> str:
    """Narrow enough for 80 columns: layers on lines of their own."""
    lines = [["traffic", "requests", "retries", "tokens", "MB up", "MB down", "own s", "wait s", "eval s"]]
    for kind, directions in by_kind(rows).items():
        lines.append([kind])
        lines += [["  " + direction, *_cells(sums)] for direction, sums in directions.items()]
    lines.append(["all", *_cells(total(rows))])
    widths = [max(len(line[n]) for line in lines if len(line) > 1) for n in range(len(lines[0]))]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False))]
        for line in lines
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in padded) + "\n"


def _set_up_line(costs: Mapping[str, float]) -> str:
    if not costs["weights"]:
        return ""
    weights, received = costs["weights"] / 1e6, costs["bytes_down"] / 1e6
    return f"set-up: {weights:.1f} million weights read, {received:.1f} MB down, {costs['seconds']:.2f} s\n"


def _cells(sums: Mapping[str, float]) -> list[str]:
    return [
        *(f"{sums[name]:.0f}" for name in ("requests", "retries", "tokens")),
        *(f"{sums[name] / 1e6:.1f}" for name in ("bytes_up", "bytes_down")),
        f"{sums['encrypt_seconds'] + sums['decrypt_seconds']:.2f}",
        *(f"{sums[name]:.2f}" for name in ("wait_seconds", "evaluate_seconds")),
    ]
