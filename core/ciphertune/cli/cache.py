"""The command ``ciphertune cache``: what is kept on disk between runs."""

from __future__ import annotations

import time

import click

from ciphertune.cache import entries, remove
from ciphertune.cli.output import megabytes, print_json, print_table


@click.command()
@click.option("--clear", is_flag=True, help="Remove everything that no process uses.")
@click.option("--part", metavar="NAME", help="Only this part, as mlwe-hints.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache(clear: bool, part: str | None, as_json: bool) -> None:
    """Show what backends and transports keep on disk between runs, and remove it.

    All of it can be made again. The folder is CIPHERTUNE_CACHE, or ciphertune in the user's cache folder.
    """
    found = entries(part)
    removed = [entry for entry in found if clear and remove(entry)]
    kept = [entry for entry in found if entry not in removed]
    if as_json:
        rows = [
            {"part": each.part, "name": each.name, "bytes": each.nbytes, "last_used": each.last_used} for each in kept
        ]
        print_json({"kept": rows, "removed_bytes": sum(each.nbytes for each in removed)})
        return
    if kept:
        times = [time.strftime("%Y-%m-%d %H:%M", time.localtime(each.last_used)) for each in kept]
        print_table(
            "In use, kept" if clear else "Kept between runs",
            ["part", "name", "size", "last used"],
            [(each.part, each.name, megabytes(each.nbytes), at) for each, at in zip(kept, times, strict=True)],
        )
    if clear:
        click.echo(f"Removed {len(removed)} entries, {megabytes(sum(each.nbytes for each in removed))}.")
    elif not kept:
        click.echo("Nothing is kept.")
