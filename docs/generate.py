"""Writes the pages that are made from code: ``python docs/generate.py``. A test holds them equal to what it writes."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ciphertune
from ciphertune import hookspecs, testing
from ciphertune.cli.output import percent
from ciphertune.models import known
from ciphertune.planning.shares import shares_of
from ciphertune.selection import SessionOptions

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
PICTURES = DOCS / "images" / "performance"
sys.path.insert(0, str(BENCHMARKS))

sys.path.insert(0, str(DOCS))

import figures  # noqa: E402
import floors  # noqa: E402
import plots  # noqa: E402
import reference  # noqa: E402
import separate  # noqa: E402
import settings  # noqa: E402

_HEAD = "<!-- Made by docs/generate.py from {source}; change it there. -->\n\n"


def _dedented(function: Callable[..., Any]) -> str:
    return inspect.cleandoc(function.__doc__ or "")


def _sections(docstring: str) -> str:
    """A Google-style docstring in Markdown: arguments become a list."""
    lines: list[str] = []
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif match := re.match(r"    (\w[\w, ]*): (.*)", line):
            lines.append(f"- `{match[1]}`: {match[2]}")
        else:
            lines.append(re.sub(r"^ {4,8}", "  " if line.startswith("        ") else "", line))
    return "\n".join(lines).replace("``", "`")


def hooks() -> str:
    """The hooks reference."""
    parts = [_HEAD.format(source="ciphertune/hookspecs.py"), "# Hooks reference\n\n"]
    parts.append(_sections(inspect.cleandoc(hookspecs.__doc__ or "")) + "\n")
    for name, function in vars(hookspecs).items():
        if name.startswith("ciphertune_"):
            arguments = ", ".join(inspect.signature(function).parameters)
            parts.append(f"\n## `{name}({arguments})`\n{_sections(_dedented(function))}\n")
    parts.append("\n## What a hook gets\nA session is a `ciphertune.Session`, of which a hook relies on this.\n\n")
    parts.append(reference.module("hookspecs.py", _sections, ("SessionView", "INTERFACE_VERSION"), level=3))
    for path, names in (
        ("traffic.py", ("Exchange", "Traffic", "SetUp")),
        ("weights.py", ("LayerInfo",)),
        ("backend.py", ("SecurityStatement",)),
        ("selection.py", ("Selection",)),
    ):
        home = path.removesuffix(".py")
        parts.append(f"\n`from ciphertune.{home} import {', '.join(names)}`\n\n")
        parts.append(reference.module(path, _sections, names, level=3))
    parts.append(
        "\n## Trackers\n`from ciphertune.tracker import Tracker`: the base of plugins that record runs elsewhere. It "
        "implements the hooks of training, tells runs apart and keeps figures together; a tracker writes them.\n\n"
    )
    parts.append(reference.module("tracker.py", _sections, level=3))
    return "".join(parts)


def _contract(title: str, introduction: str, *paths: str, after: Callable[[], str] = str) -> str:
    """The reference of a contract, from the modules that it is in."""
    head = _HEAD.format(source=" and ".join(f"core/ciphertune/{path}" for path in paths))
    bodies = [reference.module(path, _sections) for path in paths]
    return f"{head}# {title}\n\n{introduction}\n\n" + "\n".join([*bodies, *filter(None, [after()])])


_OURS = "Names without an underscore before them are public; a plugin imports these and no others."


def _backend_reference() -> str:
    told = (
        "What a backend implements: `from ciphertune.backend import …`. [Write a backend](write-a-backend.md) makes "
        "one, and [says in a table](write-a-backend.md#what-a-backend-can-and-cannot-do) what a backend can and cannot."
    )
    return _contract("Backend reference", f"{told} {_OURS}", "backend.py")


def _transport_reference() -> str:
    told = (
        "What a transport implements: `from ciphertune.transport import …`. [Write a transport](write-a-transport.md) "
        "makes one. Messages are on [a page of their own](reference-protocol.md)."
    )
    common = (
        "## Options common to all transports\nEvery selection string takes these, whatever its transport: they are "
        "read above transports. No `Options` of a backend or a transport may have one of their names.\n\n"
        f"{settings.table(SessionOptions, 'option')}"
    )
    return _contract("Transport reference", f"{told} {_OURS}\n\n{common}", "transport.py")


def _protocol_reference() -> str:
    told = "Messages between client and worker, and their form on a wire: `from ciphertune.protocol import …`."
    return _contract("Protocol reference", f"{told} {_OURS}", "protocol.py")


def _testing_reference() -> str:
    told = (
        "Suites and tools for tests of plugins: `from ciphertune.testing import …`. They need "
        '`pip install "ciphertune[testing]"`. `ciphertune check NAME --set ATTRIBUTE=VALUE` sets attributes of a '
        "suite. What each of its tests demands stands with the test."
    )
    modules = [f"testing/{testing._HOMES[name]}.py" for name in testing.__all__]
    head = _HEAD.format(source="core/ciphertune/testing")
    bodies = [reference.module(path, _sections, (name,)) for path, name in zip(modules, testing.__all__, strict=True)]
    return f"{head}# Testing reference\n\n{told}\n\n" + "\n".join(bodies)


def _measured(name: str) -> Any:
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def _note(name: str, *parts: str) -> str:
    """What a measurement says of itself, such as that it is out of date; a new one says nothing."""
    found = functools.reduce(lambda content, part: content[part], parts, _measured(name))
    note = found.get("note")
    return f"\n**{note}**\n" if note else ""


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def _figures() -> str:
    found = _measured("results")
    table = _table(("what", "measured", "to reach"), figures.rows(found))
    return f"{table}\nMeasured on {_place(found['machine'])}.\n"


def _place(machine: dict[str, Any]) -> str:
    """A machine in words, and how busy it was."""
    where = f"{machine['processor']} ({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}"
    return f"{where}; load of the machine before it began {machine['load_before']}"


def _summary() -> str:
    return _table(("what", "measured"), figures.summary(_measured("results"))) + _note("results")


def _step() -> str:
    step = _measured("results")["step"]
    phases = [f"{verb} {step[f'{name}_s']:.1f} s" for name, verb in _PHASES.items()]
    whole = f"In one run of {step['encrypted_step_s']:.1f} s a step"
    first = f"{whole}: {', '.join(phases)}, and the rest (attention, norms, head,"
    losses = [
        (name, *(f"{loss:.4f}" for loss in step[key]))
        for name, key in (("in the clear", "loss_plaintext"), ("`mlwe`", "loss_encrypted"))
    ]
    steps = ("", *(str(n) for n in range(1, len(step["loss_plaintext"]) + 1)))
    table = _table(steps, losses) + _note("results")
    return f"{first}\nloss, LoRA, optimizer) as in plaintext. The losses of its steps:\n\n{table}"


_PHASES = {"encrypt": "encrypting", "evaluate": "evaluating", "decrypt": "decrypting"}


def _ratios() -> str:
    machine = _measured("sweep")["machine"]
    where = f"{machine['processor']} ({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}"
    busy = (
        ""
        if machine["load_before"] < 0.5 * machine["threads"]
        else " (**busy with other work: look at the trend, not at single points**)"
    )
    return (
        "![Evaluation, and encryption, evaluation and decryption together, over the plaintext product, for "
        "several numbers of features, falling with the number of tokens](images/performance/ratios.svg)\n\n"
        f"Measured on {where}; load of the machine before it began {machine['load_before']}{busy}.\n"
    ) + _note("sweep")


def _losses() -> str:
    rows = []
    for run in _measured("losses")["runs"]:
        parts = (run["plaintext"], run["encrypted"])
        apart = max(abs(a - b) for a, b in zip(*(part["losses"] for part in parts), strict=True))
        rows.append(
            (
                run["model"],
                f"{len(parts[0]['losses'])}",
                f"{apart:.4f}",
                run["metric"],
                f"{run['held_out_before']:.2f}",
                *(f"{part['held_out']:.2f}" for part in parts),
            )
        )
    header = ("model", "steps", "losses apart at most", "held out", "before", "after, in the clear", "after, encrypted")
    return (
        "![Training losses of a network and of a language model: the encrypted curve lies on the one in the clear]"
        f"(images/performance/losses.svg)\n\n{_table(header, rows)}"
    ) + _note("losses")


def _compare() -> str:
    if "compare" not in plots.present():
        return ""
    return (
        "![Seconds and megabytes of one product under every installed backend](images/performance/compare.svg)\n\n"
        "The whole table, with errors, keys and security, and what is measured and what is scaled: "
        "[comparison](concrete.md#comparison).\n"
    ) + _note("compare")


def _overlap() -> str:
    measured = _measured("overlap")
    rows = []
    for row in measured["rows"]:
        workers = f"{row['workers']} over {row.get('over', 'zmq')}" if row["workers"] else "in this process"
        whole, apart, together = (row["step_s"][way] for way in ("whole", "one after the other", "interleaved"))
        rows.append(
            (
                f"{row['model']}, {row['tokens']:,}",
                workers + ", pinned" * row["pinned"],
                f"{1e3 * row['latency_s']:g} ms",
                *(f"{value:.3g} s" for value in (whole, apart, together)),
                f"{together / apart:.2f}",
                f"{together / whole:.2f}",
            )
        )
    header = (
        *("model, tokens", "workers", "latency each way", "whole", "one after the other", "interleaved"),
        *("interleaved / one after the other", "/ whole"),
    )
    m = measured["machine"]
    fewer = {row["model"]: row["repeat"] for row in measured["rows"] if "repeat" in row}
    exceptions = "".join(f", of {repeat} for {model}" for model, repeat in fewer.items())
    return (
        _table(header, rows) + f"\nMeasured on {m['processor']} ({m['capability']}), torch {m['torch']}, medians of "
        f"{measured['repeat']} rounds{exceptions}; load of the machine before it began {m['load_before']}.\n"
    ) + _note("overlap")


def _cluster() -> str:
    found = _measured("cluster")
    m = found["machine"]
    rows = [
        ("zmq", f"{found['against_step_s']:.1f} s", "1"),
        ("ray", f"{found['encrypted_step_s']:.1f} s", f"{found['against_ratio']:.2f}, to reach ≤ 1.3"),
        ("in the clear", f"{found['plaintext_step_s']:.1f} s", ""),
    ]
    return (
        _table(("one worker over", f"SmolLM2 step of {found['tokens']:,} tokens", "over zmq"), rows)
        + f"\nMeasured on {m['processor']} ({m['capability']}), torch {m['torch']}, medians of "
        f"{found['steps'] - 1} steps; load of the machine before it began {m['load_before']}.\n"
    ) + _note("cluster")


def _separate() -> str:
    found = _measured("separate")
    where = (
        "Carried over from single runs on a machine that did other work: to be measured again, with this script."
        if found["machine"] is None
        else _where(found["machine"])
    )
    return f"{_table(('what', 'measured', 'to reach'), separate.rows(found))}\n{where}\n" + _note("separate")


def _scale() -> str:
    """Steps of models with billions of weights, beside what was planned."""
    if not (BENCHMARKS / "scale.json").exists():
        return "Not measured yet.\n"
    rows = []
    found: Any = _measured("scale")
    for each in found:
        set_up, wrong = each["set_up"], (each["planned_step_s"] or math.nan) / each["step_s"] - 1
        exact = each["bytes_up"] == each["planned_up"] and each["bytes_down"] == each["planned_down"]
        planned = (
            "as planned" if exact else f"planned {_gigabytes(each['planned_up'])} / {_gigabytes(each['planned_down'])}"
        )
        rows.append(
            (
                f"`{each['shape']}`, {each['tokens']} tokens",
                f"{each['outsourced_weights'] / 1e6:,.0f} million",
                f"{set_up['seconds']:.0f} s",
                f"{_gigabytes(each['prepared_bytes'])} on disk",
                f"{each['step_s']:.1f} s (planned {100 * wrong:+.0f}%)",
                f"{_gigabytes(each['client_peak'])} / {_gigabytes(each['worker_peak'])}",
                f"{_gigabytes(each['bytes_up'])} / {_gigabytes(each['bytes_down'])}, {planned}",
            )
        )
    header = (
        "model, tokens",
        "weights at the worker",
        "set-up, once",
        "hints",
        "a step",
        "peak memory, client / worker",
        "up / down",
    )
    return f"{_table(header, rows)}\n{_where(found[-1]['machine'])}\n"


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


_BOTTLENECKS = {
    "crypto": "encryption",
    "rest": "client",
    "evaluate": "workers",
    "uplink": "upload",
    "downlink": "download",
    "latency": "latency",
}


def _predicted() -> str:
    """Steps of large models, by workers and bandwidth."""
    found = _measured("predict").get("table")
    if found is None:
        return "Not measured yet.\n"
    parts = [
        f"![Seconds a step over workers, falling until the client and its network are what is waited for]"
        f"(images/performance/workers.svg)\n\n{_where(found['machine'])}\n"
    ]
    rows = found["rows"]
    bandwidths = list(dict.fromkeys(row["bandwidth"] for row in rows))
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for workers in dict.fromkeys(row["workers"] for row in rows):
            by = {r["bandwidth"]: r for r in rows if (r["model"], r["workers"]) == (model, workers)}
            lines.append((str(workers), *(_cell(by[bandwidth]) for bandwidth in bandwidths)))
        parts.append(f"\n**`{model}`**\n\n{_table(('workers', *bandwidths), lines)}")
    return "".join(parts) + _note("predict", "table")


def _cell(row: Any) -> str:
    how = "" if row["workers"] == 1 else f", {row['placement']}"
    twice = f", {row['interleave']} interleaved" if row["interleave"] > 1 else ""
    return f"{row['seconds']:,.0f} s{how}{twice}; {_BOTTLENECKS[row['bottleneck']]}; {row['worker_bytes'] / 1e9:.2g} GB"


def _validated() -> str:
    """Predictions against runs."""
    found = _measured("predict").get("validate")
    if found is None:
        return "Not measured yet.\n"
    rows = []
    for row in found["rows"]:
        several = f", {row['micro_batches']} micro-batches" if row["micro_batches"] > 1 else ""
        several += f", {row['interleave']} at once" if row["interleave"] > 1 else ""
        rows.append(
            (
                f"{row['tokens']:,} tokens{several}",
                f"{row['workers']}" + (f", {row['placement']}" if row["workers"] > 1 else ""),
                row["latency"],
                f"{row['measured_s']:.2f} s",
                " to ".join(f"{s:.2f}" for s in sorted(row["predicted_before_and_after_s"])) + " s",
                f"{100 * row['error']:+.0f}%",
            )
        )
    header = ("a step", "workers", "latency one way", "measured", "predicted", "error")
    pinned = "client and workers on a core each" if found["pinned"] else "client and workers on the same cores"
    table = _table(header, rows) + _note("predict", "validate")
    return f"SmolLM2-135M over zmq, {pinned}. {_where(found['machine'])}\n\n{table}"


def _several() -> str:
    """More workers, measured and planned."""
    if not (BENCHMARKS / "several.json").exists():
        return "Not measured yet.\n"
    found = _measured("several")
    one = found["rows"][0]["measured_s"]
    rows = [
        (
            f"{row['workers']}" + (f", {row['placement']}" if row["workers"] > 1 else ""),
            f"{row['measured_s']:.1f} s",
            f"{one / row['measured_s']:.1f}",
            f"{row['predicted_s']:.1f} s",
            f"{100 * row['error']:+.0f}%",
            _BOTTLENECKS[row["limit"]],
        )
        for row in found["rows"]
    ]
    header = ("workers", "measured", "times one worker", "planned", "error", "most of the step waits for")
    return (
        f"SmolLM2-135M over zmq, {found['rows'][0]['tokens']:,} tokens a step, the client with one core, each worker "
        f"evaluating with {found['share']:.0%} of another's speed. {_where(found['machine'])}\n\n{_table(header, rows)}"
    )


def _generation() -> str:
    """Generation with the worker on the same machine, and far away."""
    parts = []
    for name in ("generation_here", "generation"):
        if not (BENCHMARKS / f"{name}.json").exists():
            continue
        found = _measured(name)
        rows = [
            (
                row["name"],
                f"{row['tokens_a_pass']:.1f}",
                f"{row['tokens_per_second']:.2f}",
                f"{row['predicted_tokens_per_second']:.2f}",
                f"{row['times_one_sequence']:.1f}",
                f"{row['bytes_per_token'] / 1e6:.2f} MB",
            )
            for row in found["rows"]
        ]
        header = ("", "tokens a pass", "tokens/s of all", "planned", "times one sequence", "bytes a token")
        place = f"{1000 * found['latency_s']:.0f} ms one way" if found["latency_s"] else "Over loopback"
        text = f"{place}, SmolLM2-135M, greedy. {_where(found['machine'])}\n\n{_table(header, rows)}"
        if passes := found["prefill"]:
            plain = passes["plain"]
            text += (
                f"\nA prompt of {passes['tokens']} tokens takes {passes['zmq']:.2f} s there, {passes['inside']:.2f} s "
                f"with the worker in the client's process and {plain:.2f} s in the clear: {passes['zmq'] / plain:.2f} "
                f"and {passes['inside'] / plain:.2f} times as long.\n"
            )
        parts.append(text)
    return "\n".join(parts) or "Not measured yet.\n"


def _load() -> str:
    """Small requests at an idle worker and beside big ones."""
    found = _measured("load")
    kinds = {"replayed": "replays", "true": "encrypts, decrypts and checks"}
    rows = [
        (kinds[kind], share.removeprefix("p"), f"{idle:.1f} ms", f"{busy:.1f} ms", f"{busy / idle:.1f}")
        for kind, row in found["small"].items()
        for share in ("p50", "p90", "p99")
        for idle, busy in [row[share]]
    ]
    header = ("a client that", "percentile", "idle", "busy", "times")
    beside = found["small"]["replayed"]["big_per_second"]
    return (
        f"Round trips of a token's product at the worker, which has a core. Busy: {found['clients']} clients replay "
        f"products of {found['tokens']} tokens, {beside:.1f} a second of all, and {found['big_per_second_alone']:.1f} "
        f"without small ones. {_where(found['machine'])}\n\n{_table(header, rows)}"
    )


def _chats() -> str:
    """Chats at one worker."""
    found = _measured("chats")
    rows = [
        (
            f"{row['chats']}",
            f"{row['tokens_per_second']:.1f}",
            f"{1000 * row['median_s']:.0f} ms",
            f"{row['joined']:.0%}",
            f"{row['worker_s']:.0%}",
        )
        for row in found["rows"]
    ]
    header = ("chats", "tokens/s of all", "a token, median", "products evaluated with others'", "the worker computes")
    return (
        f"SmolLM2-135M, the worker with a core, chats that replay with another. A chat that encrypts, decrypts and "
        f"checks had {found['tokens_per_second_real']:.1f} tokens a second. {_where(found['machine'])}\n\n"
        f"{_table(header, rows)}"
    )


def _soak() -> str:
    """Many clients, each with a model, at one worker."""
    found = _measured("soak")
    least, most = min(found["products"]), max(found["products"])
    early, late = found["memory"]
    return (
        f"{found['clients']} clients with models and keys of their own filled one worker with a core for "
        f"{found['minutes']:g} minutes; clients that mostly replay had the other core: {sum(found['products']):,} "
        f"products, {sum(found['products']) / 60 / found['minutes']:,.0f} a second, {found['wrong']} wrong; {least:,} "
        f"to {most:,} a client; the worker computed for {found['busy']:.0%} of the time; its own memory was "
        f"{early / 1e6:.1f} MB in the first half after warm-up, {late / 1e6:.1f} MB in the second. "
        f"{_where(found['machine'])}\n"
    )


def _networks() -> str:
    """A training over a line with latency, a rate and losses."""
    found = _measured("networks")
    without = {row["system"]: row["measured"]["seconds"] for row in found["rows"] if row["loss"] == 0}
    rows = [
        (
            f"{row['system']}",
            f"{100 * row['loss']:.0f}%",
            f"{row['measured']['seconds']:.2f} s",
            f"{row['measured']['seconds'] / without[row['system']]:.1f}",
            f"{row['predicted_s']:.2f} s" if row["loss"] == 0 else "",
            f"{100 * (row['predicted_s'] / row['measured']['seconds'] - 1):+.0f}%" if row["loss"] == 0 else "",
        )
        for row in found["rows"]
    ]
    header = ("congestion control", "packets lost each way", "a step", "times one without losses", "planned", "error")
    sent = found["rows"][0]["measured"]
    return (
        f"A small model, {found['tokens']:,} tokens a step, {found['latency']} one way, {found['bandwidth']} each way; "
        f"{sent['requests']} requests and {sent['bytes']:,} bytes in the whole run, the same in every row. "
        f"{_where(found['machine'])}\n\n{_table(header, rows)}"
    )


def _capacity() -> str:
    """Many clients at one worker, measured and simulated."""
    found = _measured("capacity")
    rows = []
    for row in found["rows"]:
        real, told = row["measured"], row["predicted"]
        rows.append(
            (
                f"{row['clients']}",
                f"{row['load']:g}",
                f"{real['products_per_second']:.0f}",
                f"{told['products_per_second']:.0f}",
                f"{100 * (told['products_per_second'] / real['products_per_second'] - 1):+.0f}%",
                f"{1000 * real['median_s']:.0f} ms / {1000 * told['median_s']:.0f} ms",
                f"{1000 * real['p99_s']:.0f} ms / {1000 * told['p99_s']:.0f} ms",
            )
        )
    header = ("clients", "load", "products/s", "predicted", "error", "median, measured / predicted", "p99")
    return (
        f"One worker with a core, all clients with another; load is that of the worker if nobody waited. "
        f"{_where(found['machine'])}\n\n{_table(header, rows)}"
    ) + _note("capacity")


def _many() -> str:
    """Workers and prices for many clients, on paper."""
    if not (BENCHMARKS / "many.json").exists():
        return "Not planned yet.\n"
    found = _measured("many")
    rows = []
    for row in found["rows"]:
        mixed, apart, (up, down, latency) = row["enough"], row["apart"], row["line"]
        chats, training = apart["chats"], apart["training"]
        step, token = training["kinds"]["training"], chats["kinds"]["chats"]
        enough = mixed["slowdown"] <= row["slowdown"]
        rows.append(
            (
                f"{row['clients']:,}",
                f"{row['where']} ({f'{up}, {latency}' if up == down else f'{up} up, {down} down, {latency}'})",
                f"{mixed['workers']:,}" if enough else f"none: {mixed['slowdown']:.1f} times at least",
                f"{chats['workers']:,} and {training['workers']:,}",
                f"{step['median']:.0f} s, {step['p99']:.0f} s",
                f"{token['median']:.2f} s, {token['p99']:.2f} s",
                f"{apart['tokens_per_second']:,.0f}",
                f"{(chats['bytes_per_second'] + training['bytes_per_second']) / 1e9:,.1f} GB/s",
                f"{apart['price']:.2f}",
                f"{_BREAKS[training['busiest']]}, {training[training['busiest']]:.0%}",
            )
        )
    header = (
        *("clients", "each client", "workers for all", "apart: for chats and for training", "a step: median, p99"),
        *("a token: median, p99", "tokens/s", "bytes", "price of a million tokens", "busiest"),
    )
    m = found["machine"]
    return (
        f"SmolLM2-135M, {found['chats']:.0%} chat and the others train; a worker costs {found['worker']:g} an hour and "
        f"a gigabyte {found['traffic']:g}. Workers and clients are each as fast as {m['processor']} "
        f"({m['processor capability']}) with {m['threads']} threads. Workers are enough where half of the clients wait "
        f"at most {found['rows'][0]['slowdown']:g} times as long as one alone. Times and prices are those with workers "
        "apart."
        f"\n\n{_table(header, rows)}\n{_answer(found)}"
    )


def _answer(found: Any) -> str:
    """What a provider asks for, in a sentence for each place of the fewest clients."""
    few = min(row["clients"] for row in found["rows"])
    sentences = []
    for row in found["rows"]:
        if row["clients"] == few:
            one = row["apart"]
            count = one["chats"]["workers"] + one["training"]["workers"]
            machines = 1e6 * count * found["worker"] / 3600 / one["tokens_per_second"]
            sentences.append(
                f"{row['where']} they need {count:,} machines, and a million tokens cost {one['price']:.2f}: "
                f"{machines:.2f} for machines and {one['price'] - machines:.2f} for traffic"
            )
    return f"So for {few:,} clients: {'; '.join(sentences)}.\n"


_BREAKS = {"evaluating": "evaluation", "receiving": "a worker's card, in", "sending": "a worker's card, out"}


def _where(machine: Any) -> str:
    busy = " **Busy with other work: measure again before you rely on it.**" if machine["load_before"] >= 1 else ""
    return (
        f"{machine['processor']} ({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}; "
        f"load before it began {machine['load_before']}.{busy}"
    )


def _shares() -> str:
    """Shares of the known models at the workers."""
    header = ("model", "weights (million)", "default", "with the output head", "with head and embeddings")
    rows = []
    for model in known.BUILT_IN:
        found = shares_of(model)
        parts = (found.default, found.with_head, found.with_embeddings or 0.0)
        rows.append((f"`{model}`", f"{found.weights / 1e6:,.0f}", *map(percent, parts)))
    return _table(header, rows)


def _names() -> str:
    """What ``import ciphertune`` exports, with the first line of each docstring."""
    rows = []
    for name in ciphertune.__all__:
        if not name.startswith("__"):
            first = inspect.cleandoc(getattr(ciphertune, name).__doc__ or "").splitlines()[0]
            rows.append((f"`{name}`", first.replace("``", "`").replace("|", "\\|")))
    return _table(("name", ""), rows)


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "performance.md": {
        "figures": _figures,
        "ratios": _ratios,
        "losses": _losses,
        "step": _step,
        "compare": _compare,
        "overlap": _overlap,
        "cluster": _cluster,
        "separate": _separate,
        "scale": _scale,
        "soak": _soak,
    },
    "configuration.md": {
        "keys": settings.keys,
        "worker": settings.worker_keys,
        **{name: functools.partial(settings.part, name) for name in settings.options()},
    },
    "training.md": {"names": _names},
    "planning.md": {
        "predicted": _predicted,
        "several": _several,
        "shares": _shares,
        "validated": _validated,
        "capacity": _capacity,
        "many": _many,
        "generation": _generation,
    },
    "cheaper.md": {"networks": _networks},
    "operations.md": {"load": _load, "chats": _chats},
    "../README.md": {"summary": _summary},
}


def filled(page: str) -> str:
    """A page with its made parts made again. Raises ``ValueError`` where it has no place for one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, make in PARTS[page].items():
        place = re.compile(rf"(<!-- made: {name} -->\n).*?(<!-- end -->\n)", re.S)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{page} needs one <!-- made: {name} --> … <!-- end -->")
        content = make()
        text = place.sub(lambda m, content=content: f"{m[1]}{content}{m[2]}", text)  # type: ignore[misc]
    return text


PAGES: dict[str, Callable[[], str]] = {
    "hooks.md": hooks,
    "reference-backend.md": _backend_reference,
    "reference-transport.md": _transport_reference,
    "reference-protocol.md": _protocol_reference,
    "reference-testing.md": _testing_reference,
    "images/architecture.svg": floors.draw,
    **{page: (lambda page=page: filled(page)) for page in PARTS},  # type: ignore[misc]
}


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in plots.present():
        picture = PICTURES / f"{name}.svg"
        # Drawn again only for new measurements: ids within a plot differ from one drawing to the next.
        if not picture.exists() or not picture.read_text(encoding="utf-8").startswith(plots.made_of(name)):
            picture.write_text(plots.draw(name), encoding="utf-8")
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
