"""The command ``ciphertune split``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from ciphertune.cli.output import megabytes, print_facts, print_json


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layers", multiple=True, help="Outsource only layers that match; 'all' includes the output head.")
@click.option("--embeddings", is_flag=True, help="The token embedding goes to workers, too, for encrypted lookups.")
@click.option("--convolutions", is_flag=True, help="Convolutions that save more than they cost go, too, as patches.")
@click.option("--convolution", "named", multiple=True, help="Convolutions that match go, too; may be repeated.")
@click.option(
    "--experts",
    type=click.Choice(["all", "routed"]),
    default="all",
    show_default=True,
    help="Whether experts that are layers of their own go to workers, too: 'routed' sends what routing chose.",
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of workers.")
@click.option(
    "--placement",
    default="rows",
    show_default=True,
    metavar="PLACEMENT",
    help="Of the model on workers: rows of every layer at each, whole layers, replicas, or numbers of these, as in "
    "layers:2,rows:4. 'ciphertune plan --workers' names the fastest for your network.",
)
@click.option("--weight-bits", type=click.Choice(["8", "16"]), default="8", show_default=True)
@click.option("--gguf-file", default=None, help="File within MODEL, for models in GGUF form.")
@click.option("--in-memory", is_flag=True, help="Load the model whole instead of tensor by tensor.")
@click.option(
    "--calibration",
    metavar="PATH|off",
    default=None,
    help="File with public text to find channels with outliers by, which the client then multiplies itself; by default "
    "the Python language reference.",
)
@click.option("--force", is_flag=True, help="Replace OUT where it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def split(
    model: str,
    out: Path,
    layers: tuple[str, ...],
    embeddings: bool,
    convolutions: bool,
    named: tuple[str, ...],
    experts: str,
    workers: int,
    placement: str,
    weight_bits: str,
    gguf_file: str | None,
    in_memory: bool,
    calibration: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Split MODEL, a folder or hub name for transformers or the built-in smollm2, into a bundle in OUT.

    OUT/client goes to data owners, OUT/worker (or worker-0, worker-1 …) to workers.
    """
    from ciphertune.bundle.writer import split as split_model

    with _bar(not as_json and sys.stderr.isatty()) as progress:
        result = split_model(
            model,
            out,
            layers=layers or None,
            embeddings=embeddings,
            convolutions=named or convolutions,
            experts="routed" if experts == "routed" else "all",
            workers=workers,
            placement=placement,
            weight_bits=16 if weight_bits == "16" else 8,
            gguf_file=gguf_file,
            in_memory=in_memory,
            calibration=calibration,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json({**dataclasses.asdict(result), "fraction": result.fraction})
        return
    facts = {
        str(result.client): f"{megabytes(result.client_bytes)}: everything but the outsourced weights; for data owners"
    }
    for folder, size in zip(result.workers, result.worker_bytes, strict=True):
        facts[str(folder)] = f"{megabytes(size)} of weights; for a worker"
    facts["outsourced"] = f"{100 * result.fraction:.1f}% of the weights, in {result.layers} layers"
    facts["outlier channels"] = (
        f"none kept: {result.uncalibrated}"
        if result.uncalibrated
        else f"kept at the client in {result.with_outliers} of {result.products} products"
    )
    print_facts(f"{model}, split", facts)
    click.echo(
        f"Worker: ciphertune worker {result.workers[0]} --bind tcp://0.0.0.0:5555 --curve KEYS\n"
        f'Client: ciphertune.load_client("{result.client}", to="mlwe+zmq://HOST:5555?curve=KEYS")'
    )


class _bar:  # noqa: N801 - used as a function
    """A progress bar of weights written; nothing where it is off."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> _bar:
        if self._on:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("Splitting", total=None)
            self._progress.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._on:
            self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._progress.stop()
