"""Options that the commands share which use a model: which one, and how it generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ciphertune.generation.opening import OpenedModel
    from ciphertune.generation.settings import GenerationSettings
    from ciphertune.generation.source import ModelSource

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_MODEL = (
    click.argument("model"),
    click.option("--to", default=None, help="Selection string.  [default: the run's file's, else mlwe]"),
    click.option("--adapter", default=None, metavar="FOLDER", help="LoRA adapter of the model, as peft saves it."),
    click.option("--no-adapter", is_flag=True, help="With a run's file: the model as it was before the run."),
    click.option("--gguf-file", default=None, help="File within the folder MODEL, for models in GGUF form."),
    click.option("--weights", default=None, metavar="FOLDER", help="With a bundle's part: a worker's folder to read."),
    click.option("--layers", multiple=True, help="Outsource only layers that match; may be repeated."),
    click.option("--embeddings", is_flag=True, help="Put the token embedding at the workers, too."),
    click.option(
        "--calibration",
        default=None,
        metavar="FILE",
        help="Public text to find channels with outliers by, or 'off'.  [default: the Python language reference]",
    ),
    click.option("--chat-template-path", default=None, metavar="FILE", help="Chat template in Jinja."),
    click.option(
        "--plugin",
        "plugins",
        multiple=True,
        metavar="NAME[?OPTION=VALUE&…]",
        help="Use a hook plugin, beside those that the run's file names; may be repeated.",
    ),
)
PAD_TOKENS = click.option(
    "--pad-tokens",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Pad to a multiple of this number of tokens, which hides from workers how long texts are.",
)
_GENERATION = (
    click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens at most."),
    click.option("--do-sample/--no-do-sample", default=None, help="Draw tokens, or take the most probable ones."),
    click.option("--temperature", type=float, default=None, help="Divides logits before tokens are drawn."),
    click.option("--top-p", type=float, default=None, help="Draw from the tokens with this probability together."),
    click.option("--top-k", type=int, default=None, help="Draw from this number of most probable tokens."),
    click.option("--num-beams", type=int, default=None, help="Beams to search, all evaluated together."),
    click.option("--repetition-penalty", type=float, default=None, help="Divides logits of tokens that occurred."),
    click.option(
        "--prompt-lookup-num-tokens",
        type=int,
        default=None,
        help="Guess this number of tokens at once from the text so far, and check them in one pass.",
    ),
    click.option("--draft", default=None, metavar="MODEL", help="Small model, in the clear here, that guesses tokens."),
    click.option("--seed", type=int, default=None, help="Seed of what is drawn."),
    PAD_TOKENS,
    click.option(
        "--fixed-length",
        is_flag=True,
        help="Go on for all of --max-new-tokens, which hides from workers where the answer ends.",
    ),
)
_SOURCE = (
    "to",
    "adapter",
    "no_adapter",
    "gguf_file",
    "weights",
    "layers",
    "embeddings",
    "calibration",
    "chat_template_path",
    "plugins",
)
_SETTINGS = (
    *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"),
    *("prompt_lookup_num_tokens", "seed", "pad_tokens", "fixed_length"),
)


def model_options(command: CommandT) -> CommandT:
    """Add the argument MODEL and the options that say which model it is."""
    for decorate in reversed(_MODEL):
        command = decorate(command)
    return command


def generation_options(command: CommandT) -> CommandT:
    """Add the options that say how answers are generated."""
    for decorate in reversed(_GENERATION):
        command = decorate(command)
    return command


def settings_of(options: dict[str, Any]) -> GenerationSettings:
    """What the options of generation ask for. Raises ``ConfigError``."""
    from ciphertune.generation.settings import GenerationSettings

    return GenerationSettings(**{name: options[name] for name in _SETTINGS})


def source_of(model: str, options: dict[str, Any]) -> ModelSource:
    """Which model a command line names. Raises as ``find_source``."""
    from ciphertune.generation.source import find_source

    return find_source(model, **{name: options[name] for name in _SOURCE})


def opened(model: str, options: dict[str, Any], *, quiet: bool = False) -> OpenedModel:
    """Open the model that a command line names. Raises as ``open_model``."""
    from ciphertune.generation.opening import open_model

    return open_model(source_of(model, options), None if quiet else lambda line: click.echo(line, err=True))


def existing(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A path of a file that is there. Raises ``ConfigError``."""
    from ciphertune.errors import ConfigError

    if value is not None and not value.is_file():
        raise ConfigError(f"there is no file {value}")
    return value
