"""The command ``ciphertune eval``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from ciphertune.cli.output import megabytes, print_facts, print_json
from ciphertune.cli.using import PAD_TOKENS, existing, model_options, source_of


@click.command()
@model_options
@click.option(
    "--data", default=None, metavar="SOURCE", help="Held-out texts, conversations or answers, as 'train' reads them."
)
@click.option(
    "--choices",
    type=click.Path(path_type=Path),
    callback=existing,
    default=None,
    metavar="FILE",
    help="Questions: rows with 'question', 'choices' and 'answer'.",
)
@click.option("--chat", is_flag=True, help="Ask the questions of --choices by the model's chat template.")
@click.option(
    "--length",
    type=click.IntRange(2),
    default=None,
    help="Tokens of a sequence at most.  [default: the run's file's, else 256]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Sequences evaluated together."
)
@PAD_TOKENS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def eval(  # noqa: A001
    model: str,
    data: str | None,
    choices: Path | None,
    chat: bool,
    length: int | None,
    batch_size: int,
    pad_tokens: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model whose layers are at workers: loss and perplexity, and accuracy on questions with choices.

    MODEL is as for 'generate'. With the file of a run, and without --data and --choices, it is measured on what the run
    held out.
    """
    from ciphertune.errors import ConfigError
    from ciphertune.generation.choices import measure_accuracy, read_questions
    from ciphertune.generation.evaluation import HeldOutData
    from ciphertune.generation.opening import open_model
    from ciphertune.runs.config import DataSection

    source = source_of(model, options)
    questions = None if choices is None else read_questions(choices)
    section = source.data
    if data is not None:
        # Paths of the file are relative to it, and this one is not the file's.
        section = DataSection(data) if section is None else dataclasses.replace(section, source=data, files=None)
    elif questions is not None:
        section = None
    elif section is None:
        raise ConfigError("there is nothing to measure on: name held-out data by --data, or questions by --choices")
    held = None
    if section is not None:
        pad = pad_tokens if pad_tokens > 1 else section.pad_to_multiple_of
        section = dataclasses.replace(
            section, batch_size=batch_size, length=length or section.length, pad_to_multiple_of=pad
        )
        held = HeldOutData(section, whole=data is not None)
    with open_model(source, None if as_json else lambda line: click.echo(line, err=True)) as found:
        begun = time.monotonic()
        loss = None if held is None else held.measure(found)
        accuracy = None
        if questions is not None:
            accuracy = measure_accuracy(found, questions, batch_size=batch_size, pad_tokens=pad_tokens, chat=chat)
        seconds = time.monotonic() - begun
        traffic = found.session.traffic
    if as_json:
        none = dict.fromkeys(("loss", "perplexity", "tokens"))
        print_json(
            {
                **(none if loss is None else dataclasses.asdict(loss)),
                **({} if accuracy is None else dataclasses.asdict(accuracy)),
                "seconds": seconds,
                "bytes_up": traffic.bytes_up,
                "bytes_down": traffic.bytes_down,
            }
        )
        return
    facts: dict[str, object] = {}
    if loss is not None:
        facts |= {"loss": f"{loss.loss:.4f}", "perplexity": f"{loss.perplexity:.2f}", "predicted tokens": loss.tokens}
    if accuracy is not None:
        facts |= {
            "questions": accuracy.questions,
            "accuracy": f"{accuracy.accuracy:.1%}",
            "accuracy by length": f"{accuracy.accuracy_norm:.1%}",
        }
    facts["traffic"] = f"{megabytes(traffic.bytes_up)} up, {megabytes(traffic.bytes_down)} down"
    facts["time"] = f"{seconds:.1f} s"
    print_facts(f"{source.name} through {source.to}", facts)
