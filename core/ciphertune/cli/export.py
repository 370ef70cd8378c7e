"""The command ``ciphertune export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ciphertune.cli.output import megabytes, print_facts, print_json

_path: Any = click.Path(path_type=Path)


@click.command()
@click.argument("model")
@click.argument("out", type=_path)
@click.option("--adapter", type=_path, required=True, help="Folder of the adapter, as 'ciphertune train' leaves it.")
@click.option(
    "--form",
    type=click.Choice(["model", "gguf"]),
    default="model",
    show_default=True,
    help="A folder with the adapter merged in, or a file with the adapter alone for llama.cpp.",
)
@click.option("--gguf-file", default=None, help="File within MODEL, for models in GGUF form.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of a merged model's weights; as MODEL is stored if not given.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(
    model: str,
    out: Path,
    adapter: Path,
    form: Any,
    gguf_file: str | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a trained adapter for use elsewhere: merged into MODEL, or as a GGUF file, to OUT.

    MODEL is the model that the adapter was trained for: a folder or hub name for transformers, or the built-in smollm2.
    """
    from ciphertune.runs.export import export_adapter

    done = export_adapter(model, adapter, out, form=form, gguf_file=gguf_file, dtype=dtype, overwrite=overwrite)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    what = "merged into the model" if form == "model" else "as a file for llama.cpp"
    facts = {str(out): f"{megabytes(done.bytes)}, {done.layers} layers with an adapter, {what}; {done.dtype}"}
    if done.adapter_of not in (None, done.model):
        facts["note"] = f"the adapter says that it is of {done.adapter_of}, and was exported for {done.model}"
    print_facts(f"{adapter}, exported", facts)
