"""The command ``ciphertune share``."""

from __future__ import annotations

import dataclasses

import click

from ciphertune.cli.output import percent, print_json, print_table


@click.command()
@click.argument("models", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def share(models: tuple[str, ...], as_json: bool) -> None:
    """Print the share of a model's weights that would be at the workers, by what is outsourced.

    MODELS are folders, hub names, or known models; all known models if none is named. No weight is loaded.
    """
    from ciphertune.models.known import BUILT_IN
    from ciphertune.planning.shares import shares_of

    found = {model: shares_of(model) for model in models or BUILT_IN}
    if as_json:
        print_json({model: dataclasses.asdict(each) for model, each in found.items()})
        return
    print_table(
        "Weights at the workers",
        ["model", "weights (M)", "default", "with the output head", "with head and embeddings"],
        [
            (model, f"{each.weights / 1e6:,.0f}", *map(_percent, (each.default, each.with_head, each.with_embeddings)))
            for model, each in found.items()
        ],
    )


def _percent(share: float | None) -> str:
    return "none" if share is None else percent(share)
