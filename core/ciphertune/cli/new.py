"""The command ``ciphertune new``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ciphertune.cli.output import print_json

if TYPE_CHECKING:
    from ciphertune.cli.scaffold import Kind


@click.command()
@click.argument("kind", type=click.Choice(["transport", "wrapping", "backend", "plugin"]))
@click.argument("name")
@click.option(
    "--output", type=click.Path(path_type=Path), default=None, help="Folder to make.  [default: ciphertune-NAME]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON.")
def new(kind: Kind, name: str, output: Path | None, as_json: bool) -> None:
    """Start a project for a plugin called NAME: a transport, one that wraps others, a backend, or a hook plugin.

    It has an entry point, a skeleton, a README, a workflow for its tests, and the conformance suite, which fails until
    the skeleton is filled in.
    """
    from ciphertune.cli.scaffold import new_project

    folder = output if output is not None else Path(f"ciphertune-{name}")
    files = new_project(kind, name, folder)
    if as_json:
        print_json({"folder": str(folder), "files": [str(file) for file in files]})
        return
    for file in files:
        click.echo(f"{folder / file}")
    click.echo(f'\nNext: cd {folder}; pip install -e ".[test]"; pytest')
