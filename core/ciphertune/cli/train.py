"""The command ``ciphertune train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
@click.option("--overwrite", is_flag=True, help="Write over the results and checkpoints of an earlier run.")
@click.option(
    "--compare",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="RESULT.json",
    help="Draw the losses of another run beside this one's in the report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end and nothing else.")
def train(
    config: Path,
    to: str | None,
    plugins: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    compare: Path | None,
    as_json: bool,
) -> None:
    """Fine-tune a model as described by the file CONFIG.

    It is TOML (see the page on configuration), or YAML with the keys of 'trl sft --config'; those that do not apply are
    named. Ctrl-C and SIGTERM end the run after its step, with a checkpoint where there is a checkpoint_dir, and status
    130 or 143; a second one ends it at once.
    """
    from ciphertune.runs.config import load_config
    from ciphertune.runs.trl import is_trl, load_trl

    def say(line: str) -> None:
        click.echo(line, err=True)

    settings = load_trl(config, say) if is_trl(config) else load_config(config)
    if to is not None:
        settings = dataclasses.replace(settings, to=to)
    settings = dataclasses.replace(settings, plugins=(*settings.plugins, *plugins))
    from ciphertune.runs.stopping import RunStopped
    from ciphertune.runs.train import run_training

    command = ["ciphertune", "train", str(config.absolute()), *(() if to is None else ("--to", to))]
    command += [part for plugin in plugins for part in ("--plugin", plugin)]
    try:
        result = run_training(
            settings, resume=resume, overwrite=overwrite, compare=compare, progress=say, command=command
        )
    except RunStopped as stop:
        say(f"ciphertune: {stop}")
        click.get_current_context().exit(128 + stop.signal)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    facts: dict[str, object] = {
        "optimizer steps": result.steps,
        "training loss, first and last": f"{result.losses[0]:.4f}  {result.losses[-1]:.4f}",
    }
    if result.evaluations:
        facts |= _held_out(result.evaluations)
    facts["outsourced weights"] = f"{100 * result.outsourced_fraction:.1f}%"
    facts["traffic"] = f"{megabytes(result.traffic['bytes_up'])} up, {megabytes(result.traffic['bytes_down'])} down"
    bits = f"; {result.security_level}" if result.security_bits else ""
    facts["security"] = result.security + bits
    facts["adapter"] = result.adapter
    facts["report"] = result.report
    print_facts(f"Fine-tuned {result.model} through {result.to}", facts)


_MEASURED = {
    "eval_loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "eval_accuracy": ("accuracy", ".1%"),
    "eval_f1": ("F1 (macro)", ".3f"),
}


def _held_out(evaluations: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What was measured on held-out data, before training if it was, and at the end."""
    first, last = evaluations[0], evaluations[-1]
    before = first["step"] == 0 and len(evaluations) > 1
    return {
        f"held-out {name}{', before and after' if before else ''}": (f"{first[key]:{form}}  " if before else "")
        + f"{last[key]:{form}}"
        for key, (name, form) in _MEASURED.items()
        if key in last
    }
