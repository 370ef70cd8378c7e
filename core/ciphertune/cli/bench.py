"""The commands ``ciphertune bench``: products and training steps against plaintext in the same run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ciphertune.cli.output import megabytes, print_facts, print_json, print_table

if TYPE_CHECKING:  # it imports torch
    from ciphertune.bench.table import Table

_to = click.option("--to", default="mlwe", show_default=True, help="Selection string.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_seed = click.option("--seed", default=0, show_default=True, help="Seed of weights, data and adapters.")


@click.group()
def bench() -> None:
    """Measure products and training steps against plaintext in the same run."""


@bench.command()
@_to
@click.option("--tokens", default=2048, show_default=True, help="T, rows of the input.")
@click.option("--in-features", default=2048, show_default=True, help="K, columns of the weight.")
@click.option("--out-features", default=2048, show_default=True, help="N, rows of the weight.")
@click.option("--repeat", default=7, show_default=True, help="Rounds; medians are shown.")
@_seed
@_json
def kernel(to: str, tokens: int, in_features: int, out_features: int, repeat: int, seed: int, as_json: bool) -> None:
    """Measure one product: seconds to encrypt, evaluate and decrypt, bytes both ways, and its error."""
    from ciphertune.bench.kernel import bench_kernel

    result = bench_kernel(to, tokens, in_features, out_features, repeat, seed)
    if as_json:
        print_json(result)
        return
    plain = result["plaintext_fp32_s"]

    def against(name: str) -> str:
        return f"{1e3 * result[name]:.2f} ms ({result[name] / plain:.2f}×)"

    print_facts(
        f"{tokens} × {in_features} × {out_features} with {to}, medians of {repeat}",
        {
            "plaintext float32": f"{1e3 * plain:.2f} ms",
            **({} if result["plaintext_bf16_s"] is None else {"plaintext bfloat16": against("plaintext_bf16_s")}),
            "encrypt": against("encrypt_s"),
            "evaluate": against("evaluate_s") + ("" if result["kernel"] is None else f" by {result['kernel']}"),
            "decrypt": against("decrypt_s"),
            "all three": f"{result['total_ratio']:.2f}× of plaintext",
            "up": _bytes(result, "up"),
            "down": _bytes(result, "down"),
            "error against float32 weights": _error(result["relative_rms_error"]),
            "error against the worker's weights": _error(result["relative_rms_error_quantized_weight"]),
            "security": result["security_level"],
        },
    )


@bench.command()
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    help="smollm2 or mlp; llama-3-8b or another known shape, with random weights; or a folder with a language model.",
)
@_to
@click.option("--tokens", default=1024, show_default=True, help="Tokens (of mlp: samples) a step.")
@click.option("--steps", default=4, show_default=True, help="Optimizer steps; the first warms up.")
@click.option("--repeat", default=1, show_default=True, help="Processes of each mode, in turn.")
@click.option("--against", default=None, help="Another selection string to compare with in the same run.")
@click.option("--micro-batches", default=1, show_default=True, help="Parts to compute an encrypted step's batch in.")
@click.option("--interleave", default=1, show_default=True, help="Micro-batches under way at once.")
@_seed
@_json
def train(
    model: str,
    to: str,
    tokens: int,
    steps: int,
    repeat: int,
    against: str | None,
    micro_batches: int,
    interleave: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a training step: seconds, peak memory, traffic and loss, encrypted and in the clear."""
    from ciphertune.bench.train import bench_train

    result = bench_train(model, to, tokens, steps, repeat, seed, against, micro_batches, interleave)
    if as_json:
        print_json(result)
        return
    print_facts(
        f"{model}, {tokens} a step, with {to}",
        {
            "micro-batches": f"{micro_batches}, {interleave} at once",
            "plaintext step": f"{result['plaintext_step_s']:.3f} s",
            **_half(result),
            "encrypted step": f"{result['encrypted_step_s']:.3f} s ({result['ratio']:.2f}×)",
            **_comparison(result),
            **_set_up(result["set_up"], result["plaintext_step_s"]),
            "of it encrypting": f"{result['encrypt_s']:.3f} s",
            "of it evaluating": f"{result['evaluate_s']:.3f} s"
            + ("" if result["kernel"] is None else f" by {result['kernel']}"),
            "of it decrypting": f"{result['decrypt_s']:.3f} s",
            "peak memory": f"{result['peak_rss_mb']:.0f} MB ({result['memory_ratio']:.2f}×)",
            "up a step": f"{megabytes(result['bytes_up'])} in {result['requests']} requests",
            "down a step": megabytes(result["bytes_down"]),
            "losses in the clear": _losses(result["loss_plaintext"]),
            "losses encrypted": _losses(result["loss_encrypted"]),
        },
    )


@bench.command()
@click.option("--to", default="mlwe+zmq://", show_default=True, help="Selection string; no endpoint: start a worker.")
@click.option("--count", default=2000, show_default=True, help="Number of requests.")
@_json
def link(to: str, count: int, as_json: bool) -> None:
    """Measure the round trip of an empty request to a worker in another process."""
    from ciphertune.bench.link import bench_link

    result = bench_link(to, count)
    if as_json:
        print_json(result)
        return
    facts = {"median": f"{1e3 * result['median_s']:.3f} ms", "99th percentile": f"{1e3 * result['p99_s']:.3f} ms"}
    print_facts(f"Empty request over {to}, {count} times", facts)


@bench.command()
@click.option("--to", multiple=True, help="Selection string; may be repeated.  [default: every installed backend]")
@click.option("--tokens", default=64, show_default=True, help="T of the large product.")
@click.option("--in-features", default=768, show_default=True, help="K of the large product.")
@click.option("--out-features", default=768, show_default=True, help="N of the large product.")
@click.option("--repeat", default=3, show_default=True, help="Rounds; medians are shown.")
@click.option(
    "--seconds", default=60.0, show_default=True, help="A product expected to take longer is scaled from a smaller one."
)
@_seed
@_json
def compare(
    to: tuple[str, ...],
    tokens: int,
    in_features: int,
    out_features: int,
    repeat: int,
    seconds: float,
    seed: int,
    as_json: bool,
) -> None:
    """Measure every installed backend on the same product: time, traffic, keys, error and security side by side."""
    from ciphertune.bench.compare import Product, bench_compare
    from ciphertune.bench.table import tables

    result = bench_compare(to or None, Product(tokens, in_features, out_features), repeat, seconds, seed)
    if as_json:
        print_json(result)
        return
    _print_tables(tables(result))


@bench.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables as Markdown.")
@_json
def merge(files: tuple[Path, ...], as_markdown: bool, as_json: bool) -> None:
    """Put comparisons of several environments into one table.

    FILES are what `ciphertune bench compare --json` printed in each of them.
    """
    from ciphertune.bench import merging, table

    result = merging.merge(files)
    if as_json:
        print_json(result)
    elif as_markdown:
        click.echo(table.markdown(result), nl=False)
    else:
        _print_tables(table.tables(result))
        for place in table.places(result):
            click.echo(place)


def _print_tables(found: Iterable[Table]) -> None:
    for title, columns, rows, notes in found:
        print_table(title, columns, rows)
        for note in notes:
            click.echo(note)
        click.echo()


def _comparison(result: dict[str, Any]) -> dict[str, str]:
    if result["against"] is None:
        return {}
    seconds, ratio = result["against_step_s"], result["against_ratio"]
    return {f"step with {result['against']}": f"{seconds:.3f} s; the one above is {ratio:.2f}× of it"}


def _half(result: dict[str, Any]) -> dict[str, str]:
    seconds = result["plaintext_bf16_step_s"]
    return {} if seconds is None else {"plaintext step in bfloat16": f"{seconds:.3f} s"}


def _set_up(costs: dict[str, Any], step: float) -> dict[str, str]:
    if not costs["weights"]:
        return {"set-up": f"{costs['seconds']:.1f} s; nothing had to be read"}
    received = f", {megabytes(costs['bytes_down'])} from the worker" if costs["bytes_down"] else ""
    return {
        "set-up, once": f"{costs['seconds']:.1f} s ({costs['seconds'] / step:.1f}× of a plaintext step): "
        f"{costs['weights'] / 1e6:.1f} million weights read{received}"
    }


def _bytes(result: dict[str, Any], way: str) -> str:
    return f"{megabytes(result[f'bytes_{way}'])} ({result[f'bytes_{way}_per_value']:.2f} bytes a value)"


def _error(value: float) -> str:
    import math

    return f"{value:.3g}" + (f" (2^{math.log2(value):.1f})" if value > 0 else "")


def _losses(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
