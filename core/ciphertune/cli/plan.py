"""``ciphertune plan``."""

from __future__ import annotations

import dataclasses

import click

from ciphertune.cli.output import megabytes, print_facts, print_json, print_table


@click.command()
@click.argument("model")
@click.option("--to", default="mlwe", show_default=True, help="Selection string; no worker is asked.")
@click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Of a step.")
@click.option("--layers", multiple=True, help="Outsource only layers that match; 'all' includes the output head.")
@click.option("--target", "targets", multiple=True, default=("q_proj", "v_proj"), help="Layers with adapters.")
@click.option("--bandwidth", default="1Gbit/s", show_default=True, help="Between client and workers, each way.")
@click.option("--latency", default="1ms", show_default=True, help="One way.")
@click.option("--measure/--no-measure", default=True, help="Estimate seconds from a short measurement here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    model: str,
    to: str,
    tokens: int,
    layers: tuple[str, ...],
    targets: tuple[str, ...],
    bandwidth: str,
    latency: str,
    measure: bool,
    as_json: bool,
) -> None:
    """What outsourcing MODEL would mean: a folder, a hub name, or smollm2. No weight is loaded."""
    from ciphertune.plan import bytes_per_second, make_plan, seconds

    found = make_plan(
        model,
        to,
        tokens=tokens,
        layers="all" if layers == ("all",) else (layers or None),
        targets=targets,
        bandwidth=bytes_per_second(bandwidth),
        latency=seconds(latency),
        measure=measure,
    )
    if as_json:
        estimate = (
            None if found.estimate is None else {**dataclasses.asdict(found.estimate), "total": found.estimate.total}
        )
        print_json({**dataclasses.asdict(found), "fraction": found.fraction, "estimate": estimate})
        return
    print_table(
        f"{model} through {found.to}, {tokens} tokens a step",
        ["layers", "groups", "in", "out", "weights (M)", "requests", "up", "down"],
        [
            (
                kind.layers,
                kind.count,
                kind.in_features,
                kind.out_features,
                round(kind.weights / 1e6, 1),
                kind.requests,
                megabytes(kind.bytes_up),
                megabytes(kind.bytes_down),
            )
            for kind in found.kinds
        ],
    )
    apart = found.bytes_without_sharing
    total = found.bytes_up + found.bytes_down
    facts: dict[str, object] = {
        "outsourced": f"{found.outsourced / 1e6:.1f} million weights, {100 * found.fraction:.1f}% of all",
        "the client keeps": f"{found.at_client / 1e6:.1f} million weights, {megabytes(found.client_bytes)}",
        "a step": f"{found.requests} requests, {megabytes(found.bytes_up)} up, {megabytes(found.bytes_down)} down",
        "without sharing inputs": f"{megabytes(apart)}, so sharing sends {total / apart:.2f}× of it",
    }
    if found.stays:
        name, why = next(iter(found.stays.items()))
        facts["layers that stay"] = f"{len(found.stays)}: {name} ({why})" + (" …" if len(found.stays) > 1 else "")
    if found.refused:
        name, why = next(iter(found.refused.items()))
        more = " …" if len(found.refused) > 1 else ""
        facts["refused"] = f"{len(found.refused)}, at which outsourcing stops: {name} ({why}){more}"
    if found.estimate is not None:
        for part, value in dataclasses.asdict(found.estimate).items():
            facts[f"estimate: {part}"] = f"{value:.2f} s"
        facts["estimate: a step"] = f"{found.estimate.total:.1f} s, most of it {found.estimate.limit}"
    print_facts("", facts)
