"""The command ``ciphertune excluded``: workers that gave wrong answers."""

from __future__ import annotations

import dataclasses

import click

from ciphertune.cli.output import print_json, print_table


@click.command()
@click.option("--lift", "lifted", multiple=True, metavar="NAME", help="Take back what has this name or address.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def excluded(lifted: tuple[str, ...], as_json: bool) -> None:
    """Show workers that are asked for nothing, because they gave wrong answers; take an exclusion back.

    A worker is known by what its connection proves: its CURVE key, or the address that its TLS certificate is for.
    Where nothing proves it (plain connections, Ray), it is known by its address, for one model.
    """
    from ciphertune.client.exclusions import Exclusions
    from ciphertune.errors import ConfigError

    kept = Exclusions()
    for name in lifted:
        if not kept.lift(name):
            raise ConfigError(f"no excluded worker has the name or address {name!r}")
    found = kept.all()
    if as_json:
        print_json([{"name": each.name, **dataclasses.asdict(each)} for each in found])
    elif found:
        print_table(
            "Excluded workers",
            ["name", "worker", "known by", "since", "because"],
            [
                (each.name, each.worker, each.identity.partition(" ")[0] or "address", each.when, each.why)
                for each in found
            ],
        )
    else:
        click.echo("No worker is excluded.")
