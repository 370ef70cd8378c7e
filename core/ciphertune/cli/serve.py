"""The command ``ciphertune serve``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from ciphertune._support.logs import log_to_stderr
from ciphertune.cli.using import PAD_TOKENS, model_options, opened

log = logging.getLogger("ciphertune.serve")


@click.command()
@model_options
@click.option("--name", default=None, help="Name by which programs ask for the model.  [default: MODEL's last part]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: any that is free."
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="CIPHERTUNE_API_KEY",
    help="Key of a caller, who is then kept apart from others; may be repeated. Needed where others than this machine "
    "can reach the server. Other users of this machine see options: the variable CIPHERTUNE_API_KEY takes keys too, "
    "with blanks between them.",
)
@click.option(
    "--api-key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="File with a key in each line.",
)
@click.option(
    "--certificate", type=click.Path(dir_okay=False, path_type=Path), default=None, help="For TLS: a PEM file."
)
@click.option("--certificate-key", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Its key.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of an answer at most."
)
@click.option(
    "--max-batch", type=click.IntRange(1), default=8, show_default=True, help="Answers computed together at most."
)
@click.option(
    "--max-waiting", type=click.IntRange(1), default=64, show_default=True, help="Answers of one caller that may wait."
)
@click.option("--max-body-kb", type=click.IntRange(1), default=1024, show_default=True, help="Size of a request.")
@PAD_TOKENS
@click.option(
    "--fixed-length",
    is_flag=True,
    help="Compute all of --max-new-tokens for every answer, which hides from workers where it ends.",
)
def serve(
    model: str,
    name: str | None,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    certificate: Path | None,
    certificate_key: Path | None,
    max_new_tokens: int,
    max_batch: int,
    max_waiting: int,
    max_body_kb: int,
    pad_tokens: int,
    fixed_length: bool,
    **source: Any,
) -> None:
    """Answer programs on this machine by the chat-completions protocol, with a model whose layers are at workers.

    MODEL is as for 'generate'.

    Prints one line 'ready URL' on standard output when it takes requests; the URL shows a page to chat with. SIGTERM
    gives streams five seconds to end. Nothing of what is asked and answered is logged.
    """
    from ciphertune.serving.settings import ServeSettings

    settings = ServeSettings(
        host=host,
        port=port,
        api_keys=(*api_keys, *_read_keys(api_key_file)),
        certificate=certificate,
        certificate_key=certificate_key,
        max_new_tokens=max_new_tokens,
        max_batch=max_batch,
        max_waiting=max_waiting,
        max_body=max_body_kb << 10,
        pad_tokens=pad_tokens,
        fixed_length=fixed_length,
    )
    from ciphertune.serving.server import Server, refuse_missing

    refuse_missing()
    # Other packages could quote what they were given.
    with log_to_stderr("text", "info", ("ciphertune",)), log_to_stderr("text", "warning", ("uvicorn",)):
        if not settings.loopback and certificate is None:
            log.warning("prompts, answers and keys travel in the clear to %s: use --certificate, or a TLS proxy", host)
        with opened(model, source) as found:
            server = Server(name or Path(found.source.name).name, found.model, found.tokenizer, settings)
            click.echo(f"ready {server.address}")
            server.run()


def _read_keys(file: Path | None) -> list[str]:
    from ciphertune.errors import KeyFileError
    from ciphertune.key_files import refuse_shared

    if file is None:
        return []
    refuse_shared(file, file.stat())
    try:
        return file.read_text(encoding="ascii").split()
    except UnicodeDecodeError:
        raise KeyFileError(f"{file} holds other characters than letters, digits and signs") from None
