"""The command ``ciphertune plan``."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ciphertune.cli.output import megabytes, percent, print_facts, print_json, print_table
from ciphertune.cli.plan_summary import WAITED_FOR, duration, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ciphertune.planning.estimate import Estimate
    from ciphertune.planning.generating import GenerationPlan
    from ciphertune.planning.placing import Tried
    from ciphertune.planning.run import Run
    from ciphertune.planning.speeds import Speeds
    from ciphertune.runs.config import TrainConfig

_file: Any = click.Path(dir_okay=False, path_type=Path)
_OF_TRAINING = (
    "tokens",
    "pictures",
    "picture_size",
    "convolutions",
    "named",
    "targets",
    "first_block",
    "micro_batches",
    "interleave",
    "length",
)
_OF_GENERATION = ("sequences", "prompt_tokens", "new_tokens", "drafted", "accepted", "draft_time")
_OF_CAPACITY = ("chats", "think", "worker_bandwidth", "client_processors", "worker_price", "traffic_price", "slowdown")
_OPTIONS = {"targets": "target", "named": "convolution"}
"""Options by the names of their values, where these are others."""
_SHADES = " ▁▂▃▄▅▆▇█"
_SHOWN = 6
"""Placements that are printed."""


@click.command()
@click.argument("model")
@click.option("--to", default=None, help="Selection string; no worker is asked.  [default: mlwe, or the file's]")
@click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a step.")
@click.option("--layers", multiple=True, help="Outsource only layers that match; 'all' includes the output head.")
@click.option("--embeddings", is_flag=True, help="Outsource the token embedding, too, for encrypted lookups.")
@click.option("--convolutions", is_flag=True, help="Convolutions that save more than they cost go, too, as patches.")
@click.option("--convolution", "named", multiple=True, help="Convolutions that match go, too; may be repeated.")
@click.option("--pictures", type=click.IntRange(1), default=None, help="Pictures of a step, in place of tokens.")
@click.option(
    "--picture-size", type=click.IntRange(1), default=None, help="Pixels of each side.  [default: the model's]"
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("q_proj", "v_proj"),
    help="Ends of names of layers with adapters; may be repeated.",
)
@click.option(
    "--first-block", type=click.IntRange(0), default=0, show_default=True, help="First transformer block with adapters."
)
@click.option(
    "--bandwidth", default="1Gbit/s", show_default=True, help="Bandwidth between client and workers, each way."
)
@click.option("--up", default=None, help="Bandwidth from the client, where it is another than to it.")
@click.option("--down", default=None, help="Bandwidth to the client.")
@click.option("--latency", default="1ms", show_default=True, help="Latency of the network, one way.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of workers.")
@click.option(
    "--placement",
    default=None,
    metavar="PLACEMENT",
    help="Of the model on workers, as of 'ciphertune split': layers, rows, replicas, or layers:2,rows:4.  "
    "[default: the fastest]",
)
@click.option("--worker-memory-gb", type=click.FloatRange(0), default=None, help="Of weights that a worker may hold.")
@click.option("--micro-batches", type=click.IntRange(1), default=1, show_default=True, help="Parts of a step's batch.")
@click.option(
    "--interleave",
    type=click.IntRange(1),
    default=None,
    help="Micro-batches under way at once.  [default: the fastest]",
)
@click.option("--length", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--generate", is_flag=True, help="Plan generation of text, with a key-value cache, in place of training.")
@click.option("--sequences", type=click.IntRange(1), default=1, show_default=True, help="Sequences generated at once.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a prompt.")
@click.option(
    "--new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens to generate for each."
)
@click.option(
    "--drafted",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Tokens that prompt lookup or a draft model at the client proposes for each pass.",
)
@click.option("--accepted", type=float, help="Tokens of a sequence that a pass with drafted ones yields on average.")
@click.option("--draft-time", default="0ms", show_default=True, help="Time that the client takes for a drafted token.")
@click.option("--clients", type=click.IntRange(1), default=None, help="Plan workers for so many clients at once.")
@click.option(
    "--chats", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of clients that chat."
)
@click.option("--think", default="30s", show_default=True, help="From an answer to the next question, on average.")
@click.option("--worker-bandwidth", default="10Gbit/s", show_default=True, help="Of a worker's card, each way.")
@click.option(
    "--client-processors",
    type=click.IntRange(1),
    default=None,
    help="Processors that all clients share.  [default: each has its own]",
)
@click.option("--worker-price", type=click.FloatRange(0), default=0.0, help="Of a worker, an hour.")
@click.option("--traffic-price", type=click.FloatRange(0), default=0.0, help="Of a gigabyte, either way.")
@click.option(
    "--slowdown", type=float, default=1.5, show_default=True, help="How much longer than alone clients may wait."
)
@click.option("--one-machine", is_flag=True, help="Client and workers share one processor.")
@click.option("--measure/--no-measure", default=True, help="Estimate seconds from a short measurement here.")
@click.option("--save-speeds", type=_file, help="Write the speeds measured here to a file, for a plan made elsewhere.")
@click.option("--client-speeds", type=_file, help="File with the client's speeds, from --save-speeds there.")
@click.option("--worker-speeds", type=_file, help="File with a worker's speeds, from --save-speeds there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plan(
    context: click.Context,
    model: str,
    to: str | None,
    tokens: int,
    layers: tuple[str, ...],
    embeddings: bool,
    convolutions: bool,
    named: tuple[str, ...],
    pictures: int | None,
    picture_size: int | None,
    targets: tuple[str, ...],
    first_block: int,
    bandwidth: str,
    up: str | None,
    down: str | None,
    latency: str,
    workers: int,
    placement: str | None,
    worker_memory_gb: float | None,
    micro_batches: int,
    interleave: int | None,
    length: int,
    generate: bool,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    drafted: int,
    accepted: float | None,
    draft_time: str,
    clients: int | None,
    chats: float,
    think: str,
    worker_bandwidth: str,
    client_processors: int | None,
    worker_price: float,
    traffic_price: float,
    slowdown: float,
    one_machine: bool,
    measure: bool,
    save_speeds: Path | None,
    client_speeds: Path | None,
    worker_speeds: Path | None,
    as_json: bool,
) -> None:
    """Plan a run, a training step, generation (--generate), or workers for many clients (--clients).

    MODEL is a run's file (.toml or .yaml), whose data is read and counted, a folder (the client's part of a bundle,
    too), a hub name, or a known model ('ciphertune share' lists them). No weight is loaded. Seconds are estimated from
    speeds measured here, or on the machines that will do the work.
    """
    from ciphertune.errors import ConfigError
    from ciphertune.planning.generating import plan_generation
    from ciphertune.planning.plan import bytes_per_second, make_plan, seconds
    from ciphertune.planning.run import totals
    from ciphertune.planning.speeds import read_speeds

    if clients is None:
        _refuse_of_the_other(context, generate)
        for option in _OF_CAPACITY:
            if context.get_parameter_source(option) is not ParameterSource.DEFAULT:
                raise ConfigError(f"--{option.replace('_', '-')} is of a plan for many clients: add --clients")
    elif generate or is_run(model) or one_machine or micro_batches > 1 or interleave is not None or first_block:
        raise ConfigError(
            "--clients plans for a model, and takes none of --generate, --one-machine, --micro-batches, --first-block"
        )
    elif pictures is not None or convolutions or named:
        raise ConfigError("--clients plans for clients with texts, and takes none of --pictures and --convolutions")
    if pictures is not None and context.get_parameter_source("tokens") is not ParameterSource.DEFAULT:
        raise ConfigError("a step is of tokens or of pictures: leave --tokens or --pictures out")
    run = None
    if generate:
        name, selection = model, to or "mlwe"
    elif is_run(model):
        refuse_given(*_OF_TRAINING, "layers", "embeddings")
        config, run = run_of(Path(model))
        asked: dict[str, Any] = {"layers": config.layers, "embeddings": config.embeddings, "targets": run.targets}
        asked |= {"first_block": run.first_block, "convolutions": config.convolutions}
        asked |= {"tokens": run.tokens, "micro_batches": run.micro_batches, "interleave": run.interleave}
        asked |= {"length": run.length, "evaluation": run.evaluation}
        name, selection = config.model.name, to or config.to
    else:
        asked = {"layers": layers or None, "embeddings": embeddings, "targets": targets, "tokens": tokens}
        asked |= {"first_block": first_block, "convolutions": named or convolutions}
        asked |= {"pictures": pictures, "picture_size": picture_size}
        asked |= {"micro_batches": micro_batches, "interleave": interleave, "length": length}
        name, selection = model, to or "mlwe"
    from_client, to_client = bytes_per_second(up or bandwidth), bytes_per_second(down or bandwidth)
    client, worker = (None if file is None else read_speeds(file) for file in (client_speeds, worker_speeds))
    layers_asked = "all" if layers == ("all",) else (layers or None)
    common: dict[str, Any] = {
        "bandwidth": from_client,
        "down": to_client,
        "latency": seconds(latency),
        "placement": placement,
        "worker_memory": None if worker_memory_gb is None else 1e9 * worker_memory_gb,
        "measure": measure,
        "client": client,
        "worker": worker,
    }
    if clients is not None:
        from ciphertune.cli.plan_capacity import show_capacity
        from ciphertune.planning.capacity import ClientMix, Prices, plan_capacity

        capacity = plan_capacity(
            name,
            selection,
            ClientMix(clients, chats, tokens, targets, length, prompt_tokens, new_tokens, seconds(think)),
            layers=layers_asked,
            embeddings=embeddings,
            workers=workers if context.get_parameter_source("workers") is not ParameterSource.DEFAULT else None,
            worker_bandwidth=bytes_per_second(worker_bandwidth),
            client_processors=client_processors,
            prices=Prices(worker_price, traffic_price),
            slowdown=slowdown,
            **common,
        )
        _save(capacity.speeds, save_speeds)
        if as_json:
            print_json(dataclasses.asdict(capacity))
        else:
            show_capacity(name, capacity)
        return
    common |= {"workers": workers, "processors": "one" if one_machine else "own"}
    if generate:
        generation = plan_generation(
            name,
            selection,
            layers=layers_asked,
            embeddings=embeddings,
            sequences=sequences,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            drafted=drafted,
            accepted=accepted,
            draft_seconds=seconds(draft_time),
            **common,
        )
        _save(generation.speeds, save_speeds)
        if as_json:
            print_json(dataclasses.asdict(generation))
        else:
            _show_generation(name, generation)
        return
    found = make_plan(name, selection, **asked, **common)
    _save(found.speeds, save_speeds)
    if as_json:
        rest: dict[str, Any] = {"fraction": found.fraction}
        if run is not None:
            rest["run"] = {**dataclasses.asdict(run), "totals": dataclasses.asdict(totals(found, run))}
        if found.estimate is not None:
            estimate = dataclasses.asdict(found.estimate)
            rest["estimate"] = {**estimate, "limit": found.estimate.limit, "bottleneck": found.estimate.bottleneck}
        print_json({**dataclasses.asdict(found), **rest})
        return
    print_facts(f"{model} through {found.to}", summary(found, run, client, worker))
    print_table(
        f"A step of {found.tokens:,} {'tokens' if found.pictures is None else 'pictures'}, by layers",
        ["layers", "groups", "in", "out", "weights (M)", "requests", "up", "down"],
        [
            (
                kind.layers,
                kind.count,
                kind.in_features,
                kind.out_features,
                round(kind.weights / 1e6, 1),
                kind.requests,
                megabytes(kind.bytes_up),
                megabytes(kind.bytes_down),
            )
            for kind in found.kinds
        ],
    )
    apart = found.bytes_without_sharing
    total = found.bytes_up + found.bytes_down
    facts: dict[str, object] = {
        "outsourced": f"{found.outsourced / 1e6:.1f} million weights, {percent(found.fraction)} of all "
        f"({percent(found.largest_fraction)} at most, by --layers all --embeddings)",
        "the client keeps": f"{found.at_client / 1e6:.1f} million weights, {megabytes(found.client_bytes)}",
        "requests": f"{found.requests} a step",
        "without sharing inputs": f"{megabytes(apart)}, so sharing sends {total / apart:.2f}× of it",
    }
    if found.prepared_codes:
        facts["before the first step"] = (
            f"the client reads {found.prepared_codes / 1e6:.1f} million weights, and keeps "
            f"{megabytes(found.prepared_bytes)} made of them in memory or on disk{_beyond(found.prepared_bytes)}"
        )
    if found.stays:
        facts["layers that stay"] = _by_reason(found.stays)
    if found.refused:
        name, why = next(iter(found.refused.items()))
        more = " …" if len(found.refused) > 1 else ""
        facts["refused"] = f"{len(found.refused)}, at which outsourcing stops: {name} ({why}){more}"
    if workers > 1:
        facts["a worker holds"] = f"{megabytes(found.worker_bytes)} of weights at most ({found.placement})"
    print_facts("", facts)
    if found.tried:
        _show_tried(found.tried)
    if found.estimate is not None:
        _show(found.estimate)


def _beyond(needed: int) -> str:
    """What to say where the disk of this machine's cache has no room for what a client keeps."""
    from ciphertune.cache import cache_folder

    place = cache_folder("hints")
    while not place.exists():
        place = place.parent
    room = shutil.disk_usage(place).free
    return f": more than the {megabytes(room)} that this machine's disk has room for" if needed > room else ""


def _by_reason(stays: Mapping[str, str]) -> str:
    """How many layers stay for each reason, and the first of them."""
    names: dict[str, list[str]] = {}
    for name, why in stays.items():
        names.setdefault(why, []).append(name)
    told = [f"{of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''} ({why})" for why, of in names.items()]
    return f"{len(stays)}: {'; '.join(told)}"


_FILES = (".toml", ".yaml", ".yml")


def is_run(model: str) -> bool:
    """Whether what a user names is the file of a run."""
    return model.lower().endswith(_FILES)


def run_of(path: Path) -> tuple[TrainConfig, Run]:
    """The configuration in a file, and what it asks for. Raises ``ConfigError``."""
    from ciphertune.planning.run import read_run
    from ciphertune.runs.config import load_config
    from ciphertune.runs.trl import is_trl, load_trl

    config = load_trl(path) if is_trl(path) else load_config(path)
    return config, read_run(config)


def refuse_given(*names: str) -> None:
    """Raise ``ConfigError`` for options on the command line that a run's file decides."""
    from ciphertune.errors import ConfigError

    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = ", ".join(f"--{_OPTIONS.get(name, name).replace('_', '-')}" for name in given)
        raise ConfigError(f"{options}: a run's file says this; leave it out, or change the file")


def _save(speeds: Speeds | None, path: Path | None) -> None:
    """Write the speeds that were measured here. Raises ``ConfigError`` where nothing was."""
    from ciphertune.errors import ConfigError
    from ciphertune.planning.speeds import write_speeds

    if path is None:
        return
    if speeds is None:
        raise ConfigError("nothing was measured here that --save-speeds could write: leave out --no-measure")
    write_speeds(speeds, path)


def _refuse_of_the_other(context: click.Context, generate: bool) -> None:
    """Refuse options that say nothing of what is planned."""
    from ciphertune.errors import ConfigError

    for name in _OF_TRAINING if generate else _OF_GENERATION:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + _OPTIONS.get(name, name).replace("_", "-")
            of, other = ("training", "leave out --generate") if generate else ("generation", "add --generate")
            raise ConfigError(f"{option} is of a plan of {of}: leave it out, or {other}")


def _show_generation(model: str, found: GenerationPlan) -> None:
    """Print a plan of generation."""
    facts: dict[str, object] = {
        "a pass": f"{found.round_trips} round trips one after the other, {megabytes(found.bytes_up)} up, "
        f"{megabytes(found.bytes_down)} down",
        "a new token": f"{megabytes(found.bytes_per_token)} up and down",
        "the prompts": f"{megabytes(found.prompt_bytes_up)} up, {megabytes(found.prompt_bytes_down)} down, once",
        "latency alone": f"{found.latency_seconds:.3g} s a pass, which no speed of a machine shortens",
        "the network alone": f"{found.network_seconds:.3g} s a pass, so {found.most_tokens_per_second:.3g} tokens a "
        "second at most",
    }
    if found.drafted:
        facts["drafted"] = f"{found.drafted} tokens a pass, of which a pass yields {found.accepted:g} as you state"
    if found.refused:
        facts["refused"] = f"{len(found.refused)} groups of layers, at which outsourcing stops: see the plan of a step"
    if found.tokens_per_second is not None:
        each = found.tokens_per_second / found.sequences
        facts["first token"] = f"after {found.first_token_seconds:.3g} s"
        apart = f", {each:.3g} of each sequence" if found.sequences > 1 else ""
        facts["then"] = f"{found.tokens_per_second:.3g} tokens a second{apart}"
        facts["all of it"] = f"{found.total_seconds:.3g} s for {found.new_tokens} tokens of each sequence"
    print_facts(f"{model} through {found.to}, {found.sequences} at once, {found.prompt_tokens} tokens of prompt", facts)
    if found.path is not None:
        ordered = sorted(found.path.items(), key=lambda item: -item[1])
        total = sum(found.path.values()) or 1.0
        rows = [(WAITED_FOR[part], f"{1000 * value:.1f} ms", f"{100 * value / total:.0f}%") for part, value in ordered]
        print_table("A pass, estimated", ["waiting for", "of it", ""], rows)
        if not found.client_compute_measured:
            click.echo("What the client computes itself is a guess.")


def _show_tried(tried: Sequence[Tried]) -> None:
    """Print the placements that were compared, the best first."""
    rows = [
        (one.placement, one.interleave, duration(one.seconds), WAITED_FOR[one.bottleneck], megabytes(one.worker_bytes))
        for one in tried[:_SHOWN]
    ]
    title = f"Placements on {tried[0].workers} workers, estimated" if tried[0].workers > 1 else "Estimated"
    print_table(title, ["placement", "at once", "a step", "most of it", "a worker holds"], rows)
    if len(tried) > _SHOWN:
        click.echo(f"{len(tried) - _SHOWN} more were compared, all slower.")


def _show(estimate: Estimate) -> None:
    """Print the uses of a step's time."""
    total = estimate.total
    ordered = sorted(estimate.path.items(), key=lambda item: -item[1])
    rows = [(WAITED_FOR[part], f"{value:.2f} s", f"{100 * value / total:.0f}%") for part, value in ordered]
    print_table(
        f"A step, estimated: {total:.2f} s", ["waiting for", "of it", ""], [*rows, ("all of it", f"{total:.2f} s", "")]
    )
    busy = "   ".join(f"{name} {100 * share:.0f}%" for name, share in estimate.busy.items())
    click.echo(f"At work: {busy}")
    click.echo(f"Most of it is {WAITED_FOR[estimate.bottleneck]}.")
    click.echo(f"{estimate.chart_seconds:.3g} s of it, at work in each part:")
    for name, row in estimate.chart.items():
        click.echo(f"{name:>9} |{''.join(_SHADES[round(8 * min(1.0, value))] for value in row)}|")
    for missing in _missing(estimate):
        click.echo(missing)


def _missing(estimate: Estimate) -> list[str]:
    """Notes on what the estimate leaves out."""
    notes = []
    if not estimate.link_measured:
        notes.append("What a transport costs is not in it: name one, as in --to mlwe+zmq://, to have it measured.")
    if not estimate.client_compute_measured:
        notes.append("What the client computes itself is a guess: only causal language models of transformers are run.")
    return notes
