"""The first lines of ``ciphertune plan``: what a run comes to, in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ciphertune.cli.output import megabytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ciphertune.planning.plan import Plan
    from ciphertune.planning.run import Run
    from ciphertune.planning.speeds import Speeds

WAITED_FOR = {
    "crypto": "encrypting and decrypting",
    "rest": "computation at the client",
    "evaluate": "evaluation at the workers",
    "uplink": "upload",
    "downlink": "download",
    "latency": "latency",
}
"""What a step waits for, by its name in an estimate."""
_ALIKE = 1.03
"""Steps whose seconds are this close are alike: an estimate is no better."""


def summary(plan: Plan, run: Run | None, client: Speeds | None, worker: Speeds | None) -> dict[str, str]:
    """Facts about a plan, the most important first.

    Args:
        plan: of a step.
        run: that the step is of; None where only a model was named.
        client: speeds that were given for the client.
        worker: speeds that were given for workers.
    """
    facts: dict[str, str] = {}
    if run is not None:
        facts |= _run(plan, run)
    seconds = f"about {duration(plan.estimate.total)}; " if plan.estimate is not None else ""
    facts["a step"] = f"{seconds}{megabytes(plan.bytes_up)} up, {megabytes(plan.bytes_down)} down"
    if plan.later is not None:
        took = f"about {duration(plan.later.seconds)}; " if plan.later.seconds is not None else ""
        facts["a step, later epochs"] = (
            f"{took}{megabytes(plan.later.bytes_up)} up, {megabytes(plan.later.bytes_down)} down with frozen_cache, "
            f"which keeps {plan.later.kept_bytes:,} bytes a token on the client's disk"
        )
    if plan.prepared_codes:
        took = "" if plan.set_up_seconds is None else f", about {duration(plan.set_up_seconds)}"
        facts["set-up, once a model"] = (
            f"{megabytes(plan.set_up_bytes)} read from workers where the client has its part of a bundle alone{took}; "
            "later sessions find it on disk"
        )
    facts["memory"] = (
        f"client: {megabytes(plan.client_bytes)} of weights"
        + (f" and {megabytes(plan.prepared_bytes)} for the encryption" if plan.prepared_bytes else "")
        + f"; a worker: {megabytes(plan.worker_bytes)}"
    )
    if plan.workers > 1:
        facts["placement"] = _placement(plan)
    if plan.fewer:
        facts["workers"] = _workers(plan)
    if plan.estimate is not None:
        facts["most of a step is"] = WAITED_FOR[plan.estimate.bottleneck]
        facts["speeds of"] = f"client: {_machine(client, plan)}; workers: {_machine(worker, plan)}"
    else:
        facts["seconds"] = "not estimated: nothing was measured"
    return facts


def _run(plan: Plan, run: Run) -> dict[str, str]:
    from ciphertune.planning.run import totals

    whole = totals(plan, run)
    seconds = "" if whole.seconds is None else f"about {duration(whole.seconds)}; "
    facts = {
        "the whole run": f"{seconds}{megabytes(whole.bytes_up)} up, {megabytes(whole.bytes_down)} down",
        "it has": f"{run.steps:,} steps of about {run.tokens:,} tokens",
    }
    if run.evaluations:
        share = ""
        if whole.evaluation_seconds is not None:
            share = f", about {duration(whole.evaluation_seconds)} of it"
        facts["evaluations"] = f"{run.evaluations} of {run.held:,} sequences{share}"
    return facts


def _placement(plan: Plan) -> str:
    at_once = f", {plan.interleave} micro-batches at once" if plan.interleave > 1 else ""
    if plan.tried:
        return f"{plan.placement}{at_once}: the fastest of {len(plan.tried)} that were compared"
    asked = "as asked for" if plan.estimate is not None else "not compared: nothing was measured"
    return f"{plan.placement}{at_once}, {asked}"


def _workers(plan: Plan) -> str:
    """Seconds of a step by numbers of workers, and what more of them would change."""
    assert plan.estimate is not None
    now = plan.estimate.total
    steps = [*((one.workers, one.seconds) for one in plan.fewer), (plan.workers, now)]
    text = ", ".join(f"{count}: {duration(seconds)}" for count, seconds in steps)
    return f"{text}{_enough(steps, plan.estimate.bottleneck)}"


def _enough(steps: Sequence[tuple[int, float]], bottleneck: str) -> str:
    """Which number of workers is enough, and why more do not help; empty where the largest number helps.

    Args:
        steps: numbers of workers, rising, and the seconds of a step with each.
        bottleneck: what most of a step is with the largest number.

    >>> _enough([(1, 3.0), (2, 2.0), (4, 1.0)], "evaluate")
    ''
    >>> _enough([(1, 3.0), (2, 2.01), (4, 2.0)], "uplink")
    '. 2 are as fast: upload is the limit, not their number'
    >>> _enough([(1, 3.0), (2, 2.0), (4, 2.2)], "evaluate")
    '. 2 are faster than 4: more of them add more sending and waiting than they save'
    """
    most, now = steps[-1]
    fastest, least = min(steps, key=lambda step: step[1])
    if least * _ALIKE < now:
        return f". {fastest} are faster than {most}: more of them add more sending and waiting than they save"
    fewest = next(count for count, seconds in steps if seconds <= _ALIKE * now)
    if fewest == most:
        return ""
    why = "sending and waiting are" if bottleneck == "evaluate" else f"{WAITED_FOR[bottleneck]} is"
    return f". {fewest} are as fast: {why} the limit, not their number"


def _machine(given: Speeds | None, plan: Plan) -> str:
    if given is not None:
        return f"{given.machine.get('processor', 'another machine')} (from its file)"
    here = plan.speeds.machine if plan.speeds is not None else {}
    return f"this machine ({here.get('processor', '?')}, {here.get('threads', '?')} threads)"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.25), duration(42), duration(600), duration(9000)
    ('0.25 s', '42 s', '10 min', '2.5 h')
    """
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
