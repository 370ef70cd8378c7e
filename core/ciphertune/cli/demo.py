"""The command ``ciphertune demo``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ciphertune.cli.output import megabytes, print_json, print_table

if TYPE_CHECKING:
    from ciphertune.runs.demo import DemoResult


@click.command()
@click.option("--to", default="mlwe", show_default=True, help="Selection string: encryption, transport and workers.")
@click.option("--quick", is_flag=True, help="A small network on handwritten digits, in seconds.")
@click.option("--steps", type=int, default=None, help="Optimizer steps of each run [default: 6, quick: 80].")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True
)
@click.option("--overwrite", is_flag=True, help="Write over the results of a training run in the output folder.")
@click.option("--seed", default=0, show_default=True, help="Seed of adapters and data, the same for both runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end and nothing else.")
def demo(to: str, quick: bool, steps: int | None, output: Path, overwrite: bool, seed: int, as_json: bool) -> None:
    """Fine-tune a real model on real data twice, in the clear and encrypted, and compare.

    SmolLM2-135M on the Python language reference takes a few minutes on two cores.
    """
    from ciphertune.runs.demo import run_demo

    result = run_demo(
        output,
        to=to,
        quick=quick,
        steps=steps,
        seed=seed,
        overwrite=overwrite,
        progress=lambda line: click.echo(line, err=True),
    )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        _show(result)


def _show(r: DemoResult) -> None:
    def rate(run_rate: float) -> str:
        return f"{run_rate:,.0f} {r.unit}/s"

    slower = r.plaintext.units_per_second / r.encrypted.units_per_second
    rows = [
        ("training loss, first step", f"{r.plaintext.losses[0]:.4f}", f"{r.encrypted.losses[0]:.4f}"),
        ("training loss, last step", f"{r.plaintext.losses[-1]:.4f}", f"{r.encrypted.losses[-1]:.4f}"),
        (f"held-out {r.metric}, before", f"{r.held_out_before:.2f}", ""),
        (f"held-out {r.metric}, after", f"{r.plaintext.held_out:.2f}", f"{r.encrypted.held_out:.2f}"),
        ("speed", rate(r.plaintext.units_per_second), f"{rate(r.encrypted.units_per_second)} ({slower:.1f}× slower)"),
    ]
    print_table(f"{r.model} on {r.data}: {r.steps} steps of {r.per_step} {r.unit}", ["", "in the clear", r.to], rows)
    if r.question is not None:
        click.echo(
            f"\nAsked: {r.question}\nBefore, in the clear: {r.answer_before} …\nAfter, through {r.to}: "
            f"{r.answer_after} …\nAsk it more: ciphertune chat smollm2 --adapter {shlex.quote(r.adapter)} --to {r.to}"
        )
    traffic = r.traffic
    click.echo(
        f"\n{r.outsourced_layers} layers with {100 * r.outsourced_fraction:.1f}% of the weights were at the worker: "
        f"{traffic['requests']} requests, {megabytes(traffic['bytes_up'])} up, {megabytes(traffic['bytes_down'])} down."
    )
    bits = f"; {r.security_level}" if r.security_bits else ""
    click.echo(f"Security: {r.security}{bits}.")
    click.echo("Left the client:      " + ";\n                      ".join(r.crossed))
    click.echo("Stayed at the client: " + ";\n                      ".join(r.stayed))
    click.echo(
        f"\nAdapter (loads with stock peft): {r.adapter}\nReport: {r.report}\nLoss plot: {r.plot}\n"
        f"Took {r.seconds:.0f} s."
    )
