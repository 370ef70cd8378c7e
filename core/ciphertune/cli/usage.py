"""The command ``ciphertune usage``: what clients used of a worker, from its records of sessions."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ciphertune.cli.output import megabytes, print_json, print_table

if TYPE_CHECKING:
    from ciphertune.worker.usage import SessionRecord

_SUMS = ("products", "errors", "bytes_in", "bytes_out", "evaluate_seconds")


@click.command()
@click.argument("audit", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--since", type=click.DateTime(), help="Only sessions that were opened from then on; UTC.")
@click.option("--until", type=click.DateTime(), help="Only sessions that were opened before; UTC.")
@click.option(
    "--by",
    type=click.Choice(["client", "bundle", "day", "session"]),
    default="client",
    show_default=True,
    help="What a row is of.",
)
@click.option(
    "--curve",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the worker's clients/, to name clients by their files in place of their keys.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with exact figures.")
def usage(
    audit: Path,
    since: datetime.datetime | None,
    until: datetime.datetime | None,
    by: str,
    curve: Path | None,
    as_json: bool,
) -> None:
    """Sum up what clients used, from AUDIT, the file that 'ciphertune worker --audit' writes.

    A session counts as a whole where it was opened. Bytes are those of products, both ways; a session that is open has
    been counted to within the last seconds.
    """
    from ciphertune.plugins import registry
    from ciphertune.worker.audit import read_records

    names = {} if curve is None else registry.load(registry.TRANSPORTS, "zmq").client_names(curve)
    records = read_records(audit, _seconds(since, 0.0), _seconds(until, float("inf")))
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        key = _key(record, by, names)
        row = rows.setdefault(key, {by: key, "sessions": 0, **dict.fromkeys(_SUMS, 0)})
        row["sessions"] += 1
        for name in _SUMS:
            row[name] += getattr(record, name)
        if by == "session":
            row |= {**dataclasses.asdict(record), "client": names.get(record.client, record.client)}
    if as_json:
        print_json(list(rows.values()))
        return
    if not rows:
        click.echo("No session was opened in this time.")
        return
    print_table(
        f"Use by {by}",
        [by, "sessions", "products", "errors", "in", "out", "evaluation"],
        [
            (
                name,
                str(row["sessions"]),
                str(row["products"]),
                str(row["errors"]),
                megabytes(row["bytes_in"]),
                megabytes(row["bytes_out"]),
                f"{row['evaluate_seconds']:.1f} s",
            )
            for name, row in rows.items()
        ],
    )


def _key(record: SessionRecord, by: str, names: Mapping[str, str]) -> str:
    client = names.get(record.client, record.client)
    if by == "client":
        return client
    opened = datetime.datetime.fromtimestamp(record.opened, datetime.timezone.utc)
    if by == "day":
        return opened.strftime("%Y-%m-%d")
    return record.bundle if by == "bundle" else f"{opened:%Y-%m-%d %H:%M:%S} {client} {record.id}"


def _seconds(when: datetime.datetime | None, otherwise: float) -> float:
    return otherwise if when is None else when.replace(tzinfo=datetime.timezone.utc).timestamp()
