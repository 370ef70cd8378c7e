"""The command ``ciphertune generate``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from ciphertune.cli.output import megabytes, print_json
from ciphertune.cli.using import existing, generation_options, model_options, opened, settings_of


@click.command()
@model_options
@click.argument("prompt", nargs=-1)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    callback=existing,
    default=None,
    help="Prompts: one a line of a text, or rows with 'prompt', 'messages', 'instruction' or 'text'.",
)
@click.option("--chat", is_flag=True, help="Write prompts that are texts by the model's chat template, too.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts answered together.")
@generation_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the answers and their costs.")
def generate(
    model: str, prompt: tuple[str, ...], file: Path | None, chat: bool, batch_size: int, as_json: bool, **options: Any
) -> None:
    """Answer prompts by a model whose layers are at workers.

    MODEL is smollm2, a folder or hub name for transformers, the client's part of a bundle, or the file of a run, which
    stands for its model with the adapter that it trained. Other users of this machine see what is on the command line:
    --file keeps prompts private.
    """
    from ciphertune.errors import ConfigError
    from ciphertune.generation.answering import Answer, Costs, answer
    from ciphertune.generation.drafting import load_draft
    from ciphertune.generation.prompts import Prompt, conversation, encode, read_prompts

    settings = settings_of(options)
    prompts = [Prompt(f"prompt {number}", text) for number, text in enumerate(prompt, 1)]
    prompts += [] if file is None else read_prompts(file)
    if not prompts:
        raise ConfigError("there is no prompt: give one behind MODEL, or a file of them by --file")
    for each in prompts:
        if not each.content:
            raise ConfigError(f"{each.place} is empty")
    if chat:
        prompts = [conversation(each) for each in prompts]
    if options["draft"] is not None or settings.prompt_lookup_num_tokens is not None:
        batch_size = 1
    answers: list[Answer] = []
    costs = Costs()
    with opened(model, options, quiet=as_json) as found:
        draft = None if options["draft"] is None else load_draft(found, options["draft"])
        rows = [encode(found, each) for each in prompts]
        streamed = len(rows) == 1 and not as_json and not settings.beams and sys.stdout.isatty()
        for at in range(0, len(rows), batch_size):
            some, cost = answer(
                found,
                rows[at : at + batch_size],
                settings,
                draft=draft,
                on_text=(lambda text: click.echo(text, nl=False)) if streamed else None,
            )
            costs.add(cost)
            answers += some
            if not as_json:
                for number, one in enumerate(some, at + 1):
                    title = "" if len(rows) == 1 else f"[{number}] "
                    click.echo("" if streamed else f"{title}{one.text}")
    if as_json:
        texts = [each.text for each in answers]
        print_json(
            {
                "text": texts[0] if len(texts) == 1 else texts,
                **dataclasses.asdict(costs),
                "answers": [dataclasses.asdict(each) for each in answers],
            }
        )
        return
    rate = "" if costs.tokens_per_second is None else f", {costs.tokens_per_second:.2f} tokens a second"
    click.echo(
        f"{costs.new_tokens} new tokens{rate}; {megabytes(costs.bytes_up)} up and {megabytes(costs.bytes_down)} down "
        f"for them, {megabytes(costs.prompt_bytes_up)} and {megabytes(costs.prompt_bytes_down)} for the prompts",
        err=True,
    )
