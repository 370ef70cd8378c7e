"""The command ``ciphertune chat``."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ciphertune.cli.using import generation_options, model_options, opened, settings_of


@click.command()
@model_options
@click.option("--system", default=None, metavar="TEXT", help="System prompt.")
@generation_options
def chat(model: str, system: str | None, **options: Any) -> None:
    """Talk to a model whose layers are at workers.

    MODEL is as for 'generate'. Ctrl-C stops an answer; /exit or Ctrl-D ends; /help lists what else there is. Nothing is
    kept unless /save is asked for.
    """
    from ciphertune.generation.conversation import Conversation
    from ciphertune.generation.drafting import load_draft

    settings = settings_of(options)
    with opened(model, options) as found:
        draft = None if options["draft"] is None else load_draft(found, options["draft"])
        talk = Conversation(found, settings, _write, system, draft)
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # Lines can be edited.
            click.echo("/help lists what can be said beside messages.", err=True)
        while (line := _line(terminal)) is not None:
            if not talk.take(line):
                break


def _write(text: str) -> None:
    click.echo(text, nl=False)


def _line(terminal: bool) -> str | None:
    """The next line, None at the end."""
    if not terminal:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo("\n/exit or Ctrl-D ends.", err=True)
        return ""
