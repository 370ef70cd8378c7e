"""Output of commands: JSON for machines, tables for people."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text, or what stands in brackets would be taken for markup.
    table = Table(title=Text(title), title_justify="left", header_style="bold", show_header=any(columns))
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) for row in rows) and bool(rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    Console().print(table)


def print_entries(entries: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print names with lines below each, wrapped to the terminal's width."""
    from rich.console import Console

    width = Console().width
    for name, lines in entries:
        click.echo(click.style(name, bold=True))
        for line in filter(None, lines):
            click.echo(
                textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
            )


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print a table of names and values."""
    print_table(title, ["", ""], [(name, str(value)) for name, value in facts.items()])


def percent(share: float) -> str:
    """Print a share of 0 to 1 with two decimals, rounded down, so that 100% is all.

    >>> percent(0.99997), percent(1.0)
    ('99.99%', '100.00%')
    """
    return f"{math.floor(1e4 * share) / 100:.2f}%"


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
