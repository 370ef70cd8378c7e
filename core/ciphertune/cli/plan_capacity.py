"""What ``ciphertune plan --clients`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ciphertune.cli.output import megabytes, print_facts, print_table
from ciphertune.cli.plan_summary import duration

if TYPE_CHECKING:
    from ciphertune.planning.capacity import Capacity, CapacityPlan
    from ciphertune.planning.queueing import Waiting

_BUSY = {
    "evaluating": "evaluation at the workers",
    "receiving": "messages in, at a worker's card",
    "sending": "messages out, at a worker's card",
}
_UNITS = {"training": "a step", "chats": "a token of an answer"}


def show_capacity(model: str, found: CapacityPlan) -> None:
    """Print how many clients how many workers serve."""
    from ciphertune.planning.capacity import CHATS, TRAINING

    mix, enough = found.mix, found.enough
    who = [f"{share:.0%} {name}" for name, share in ((TRAINING, 1 - mix.chats), (CHATS, mix.chats)) if share]
    reached = enough.slowdown <= found.slowdown
    facts: dict[str, object] = {"clients": f"{mix.clients:,}: {', '.join(who)}", "a copy of the model": found.placement}
    facts["a worker holds"] = f"{megabytes(found.worker_bytes)} of weights"
    if found.asked is not None:
        facts |= _facts(found.asked)
        facts["limit"] = _limit(found.asked)
    facts["enough"] = (
        f"{enough.workers:,} workers: half of the clients wait at most {found.slowdown:g} times as long as one alone"
        if reached
        else f"no number: with a copy for each client it is {enough.slowdown:.2g} times"
    )
    print_facts(f"{model} through {found.to}", facts)
    shown = [*found.tried] if found.asked is None else sorted([found.asked, *found.tried], key=lambda one: one.workers)
    rows = [
        (
            f"{one.workers:,}",
            *(_seconds(one.kinds.get(name)) for name in _UNITS),
            f"{one.evaluating:.0%}",
            f"{max(one.receiving, one.sending):.0%}",
            f"{one.tokens_per_second:,.3g}",
            megabytes(one.bytes_per_second),
            f"{one.price:,.3g}" if one.price else "",
        )
        for one in {one.workers: one for one in shown}.values()
    ]
    columns = ["workers", "a step", "a token", "evaluating", "card", "tokens/s", "bytes/s", "price/M tokens"]
    print_table("By numbers of workers, simulated: median and 99th percentile", columns, rows)
    click.echo(f"Alone: {', '.join(f'{_UNITS[name]} {duration(one.alone)}' for name, one in enough.kinds.items())}.")


def _facts(one: Capacity) -> dict[str, object]:
    facts: dict[str, object] = {}
    for name, waiting in one.kinds.items():
        facts[f"{_UNITS[name]}, {one.workers:,} workers"] = (
            f"{duration(waiting.median)}, at the 99th percentile {duration(waiting.p99)}; "
            f"alone {duration(waiting.alone)}"
        )
    return facts


def _limit(one: Capacity) -> str:
    share = float(getattr(one, one.busiest))
    if share < 0.8:
        return f"none: {_BUSY[one.busiest]} takes {share:.0%} of the time at most"
    return f"{_BUSY[one.busiest]}, {share:.0%} of the time: more workers or faster ones help"


def _seconds(waiting: Waiting | None) -> str:
    return "" if waiting is None else f"{duration(waiting.median)}, {duration(waiting.p99)}"
