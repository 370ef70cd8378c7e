"""The command ``ciphertune train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ciphertune.cli.output import megabytes, print_facts, print_json


@click.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--to", default=None, help="Selection string instead of the file's.")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="NAME[?OPTION=VALUE&…]",
    help="Use a hook plugin, beside those that the file names; may be repeated.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option(
    "--compare",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="RESULT.json",
    help="Draw the losses of another run beside this one's in the report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end and nothing else.")
def train(
    config: Path, to: str | None, plugins: tuple[str, ...], resume: bool, compare: Path | None, as_json: bool
) -> None:
    """Fine-tune a model as described by the TOML file CONFIG."""
    from ciphertune.runs.config import load_config

    settings = load_config(config)
    if to is not None:
        settings = dataclasses.replace(settings, to=to)
    settings = dataclasses.replace(settings, plugins=(*settings.plugins, *plugins))
    from ciphertune.runs.train import run_training

    result = run_training(settings, resume=resume, compare=compare, progress=lambda line: click.echo(line, err=True))
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    facts: dict[str, object] = {
        "optimizer steps": result.steps,
        "training loss, first and last": f"{result.losses[0]:.4f}  {result.losses[-1]:.4f}",
    }
    if result.evaluations:
        last = result.evaluations[-1]
        facts["held-out loss"] = f"{last['eval_loss']:.4f}"
        if "perplexity" in last:
            facts["held-out perplexity"] = f"{last['perplexity']:.2f}"
    facts["outsourced weights"] = f"{100 * result.outsourced_fraction:.1f}%"
    facts["traffic"] = f"{megabytes(result.traffic['bytes_up'])} up, {megabytes(result.traffic['bytes_down'])} down"
    bits = f"; {result.security_level}" if result.security_bits else ""
    facts["security"] = result.security + bits
    facts["adapter"] = result.adapter
    facts["report"] = result.report
    print_facts(f"Fine-tuned through {result.to}", facts)
