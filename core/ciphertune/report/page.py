"""The report page, made from the content of ``result.json``."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ciphertune._support.atomic import replace_file
from ciphertune.report.chart import Series, chart
from ciphertune.report.redact import redacted, toml
from ciphertune.traffic import add_to, by_kind, kind_of, total, zero

_PHASES = ("encrypt", "decrypt", "network", "worker", "rest")
_ROWS = 400
"""Rows of one table; of more, every second, third … is shown."""


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write the report page with mode 0600, whole or not at all; ``content`` as for ``render``."""
    replace_file(path, render(content).encode())


def render(content: Mapping[str, Any]) -> str:
    """Make the report page of a run.

    Args:
        content: what ``result.json`` of ``ciphertune train`` or ``ciphertune demo`` holds. Every text in it is shown
            as text, whatever it is; options that could be secrets are left out.

    Returns:
        HTML that loads nothing: no script, no font, no picture. Figures that ``result.json`` has stand in ``data``
        elements, with the exact value and, in ``data-key``, where it is there.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def figure(key: str, form: Any, value: Any = None) -> Markup:
        """Format the figure of ``result.json`` at a dotted key."""
        value = look_up(content, key) if value is None else value
        return Markup('<data value="{}" data-key="{}">{}</data>').format(value, key, form(value))

    def name(text: str) -> Markup:
        """Format a dotted name so that lines may break after dots."""
        return Markup(".<wbr>").join(text.split("."))

    source = resources.files("ciphertune.report").joinpath("page.html").read_text(encoding="utf-8")
    forms = {"size": size, "duration": duration, "count": count, "percent": percent, "number": number}
    demo = "plaintext" in content
    view = _demo(content) if demo else _train(content)
    costs = content["costs"]
    return environment.from_string(source).render(
        r=content,
        costs=costs,
        view=view,
        demo=demo,
        figure=figure,
        name=name,
        to=redacted(content["to"]),
        network="network" if costs["remote"] else "call overhead",
        phases=_phases(costs),
        kinds=_kinds(costs["groups"]),
        groups=_groups(costs["groups"]),
        sums=total(costs["groups"]),
        redacted=redacted,
        **forms,
    )


def look_up(content: Any, key: str) -> Any:
    """Look up the value at a dotted key; parts are names, or indices of a list, which may be negative.

    >>> look_up({"losses": [3.0, 2.5]}, "losses.-1")
    2.5
    """
    for part in key.split("."):
        content = content[int(part)] if isinstance(content, Sequence) else content[part]
    return content


def size(value: float) -> str:
    """Format a number of bytes, with units in steps of 1000."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g} {unit}" if value < 999.5 * limit else f"{value / limit:,.0f} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Format a number of seconds."""
    if value >= 5400:
        return f"{value / 3600:.1f} h"
    if value >= 600:
        return f"{value / 60:.0f} min"
    if value >= 9.95:
        return f"{value:.0f} s"
    return f"{value:.2f} s" if value >= 0.0995 else f"{1000 * value:.1f} ms"


def count(value: float) -> str:
    """Format a number of things.

    >>> count(12345), count(3.2e9)
    ('12,345', '3.20 billion')
    """
    for limit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= limit:
            return f"{value / limit:,.3g} {name}" if value >= 100 * limit else f"{value / limit:.2f} {name}"
    return f"{value:,.0f}"


def percent(fraction: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * fraction:.1f}%"


def number(value: float) -> str:
    """Format a figure to four digits."""
    return "infinite" if math.isinf(value) else f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def _train(content: Mapping[str, Any]) -> dict[str, Any]:
    history, config = content["history"], content["config"]
    steps = [entry["step"] for entry in history]
    unit = "samples" if history and "samples" in history[0] else "tokens"
    curves = [Series(f"training, {redacted(content['to'])}", "own", steps, content["losses"])]
    other = content.get("comparison")
    if other:
        losses = other["losses"]
        curves.insert(0, Series(f"training, {redacted(other['to'])}", "other", range(1, len(losses) + 1), losses))
    held = [e for e in content["evaluations"] if math.isfinite(e["eval_loss"])]
    if held:
        places = [e["step"] for e in held], [e["eval_loss"] for e in held]
        curves.append(Series("held out", "held", *places, marks=True))
    mine = [e for e in history if e["step"] >= content["costs"]["first_step"]]
    rates = [entry[unit] / entry["seconds"] for entry in history]
    return {
        "title": f"Fine-tuning {content['model']}",
        "subtitle": f"{len(history)} optimizer steps on {Path(config['data']['source']).name}",
        "unit": unit,
        "loss": chart(curves),
        "norms": _norms(content.get("gradient_norms") or {}, history),
        "rate": chart([Series("learning rate", "own", steps, [e["learning_rate"] for e in history])], from_zero=True),
        "speed": chart([Series(f"{unit} per second", "own", steps, rates)], from_zero=True),
        "per_second": sum(e[unit] for e in mine) / sum(e["seconds"] for e in mine) if mine else None,
        "columns": ["step", "loss", *(["compared"] if other else []), "learning rate", "gradient norm", f"{unit}/s"],
        "rows": _thin(
            [
                [
                    entry["step"],
                    entry["loss"],
                    *([other["losses"][i] if i < len(other["losses"]) else None] if other else []),
                    entry["learning_rate"],
                    entry["grad_norm"],
                    rates[i],
                ]
                for i, entry in enumerate(history)
            ]
        ),
        "file": toml(
            {**config, "to": redacted(config["to"]), "plugins": [redacted(text) for text in config["plugins"]]}
        ),
        "command": _command(content["command"]) if content["command"] else None,
        "seed": config["training"]["seed"],
    }


def _norms(norms: Mapping[str, Sequence[float]], history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Norms of gradients: of all parameters together, the largest and the middle one of every step, and each one's."""
    count = min(map(len, norms.values()), default=0)
    if not count:
        return None
    # Before a resume they may not have been kept.
    kept = history[-count:]
    steps = [entry["step"] for entry in kept]
    # A parameter that a step does not use has none.
    each = [sorted(filter(math.isfinite, values)) or [0.0] for values in zip(*norms.values(), strict=False)][-count:]
    rows = []
    for name, values in norms.items():
        own = [(value, step) for value, step in zip(values[-count:], steps, strict=True) if math.isfinite(value)]
        if own:
            largest, when = max(own)
            rows.append([name, own[0][0], own[-1][0], largest, when])
    return {
        "chart": chart(
            [
                Series("all parameters together", "own", steps, [entry["grad_norm"] for entry in kept]),
                Series("largest of one parameter", "other", steps, [values[-1] for values in each]),
                Series("median of one parameter", "held", steps, [statistics.median(values) for values in each]),
            ],
            from_zero=True,
        ),
        "rows": sorted(rows, key=lambda row: -row[3]),
    }


def _command(arguments: Sequence[str]) -> str:
    """A command line without the values that could be secret."""
    secret = ("--to", "--plugin")
    given = zip(arguments, ["", *arguments], strict=False)
    return shlex.join(redacted(argument) if before in secret else argument for argument, before in given)


def _demo(content: Mapping[str, Any]) -> dict[str, Any]:
    plain, own = content["plaintext"], content["encrypted"]
    steps = range(1, content["steps"] + 1)
    unit = content["unit"]
    speeds = [[content["per_step"] / s for s in run["seconds"]] for run in (plain, own)]
    name = redacted(content["to"])
    command = ["ciphertune", "demo", "--to", name, "--steps", str(content["steps"]), "--seed", str(content["seed"])]
    if content["quick"]:
        command.insert(2, "--quick")
    return {
        "title": content["model"],
        "subtitle": f"{content['steps']} optimizer steps of {content['per_step']} {unit}, twice, on {content['data']}",
        "unit": unit,
        "norms": None,
        "loss": chart(
            [Series("in the clear", "other", steps, plain["losses"]), Series(name, "own", steps, own["losses"])]
        ),
        "rate": chart([Series("learning rate", "own", steps, own["learning_rates"])], from_zero=True),
        "speed": chart(
            [Series("in the clear", "other", steps, speeds[0]), Series(name, "own", steps, speeds[1])], from_zero=True
        ),
        "per_second": own["units_per_second"],
        "columns": ["step", "loss in the clear", "loss", "learning rate", f"{unit}/s in the clear", f"{unit}/s"],
        "rows": _thin(
            [
                list(row)
                for row in zip(
                    steps, plain["losses"], own["losses"], own["learning_rates"], speeds[0], speeds[1], strict=True
                )
            ]
        ),
        "command": shlex.join(command),
        "seed": content["seed"],
    }


def _phases(costs: Mapping[str, Any]) -> list[dict[str, Any]]:
    network = "network and queues" if costs["remote"] else "call overhead"
    names = {
        "encrypt": ("client: encrypt", "encoding, encrypting"),
        "decrypt": ("client: decrypt", "decrypting, decoding"),
        "network": (network, "from sending a request to its reply, less the worker's computing time"),
        "worker": ("worker: evaluate", "the products, as the worker reports"),
        "rest": (
            "client: the rest",
            "embeddings, norms, attention, output head, adapters, loss, optimizer, reading data",
        ),
    }
    seconds = costs["seconds"]
    return [
        {
            "key": key,
            "name": names[key][0],
            "what": names[key][1],
            "share": costs["phases"][key] / seconds if seconds else 0.0,
        }
        for key in _PHASES
    ]


def _seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """The time of a row by phase."""
    worker = min(row["evaluate_seconds"], row["wait_seconds"])
    crypto = row["encrypt_seconds"] + row["decrypt_seconds"]
    return {
        "crypto": crypto,
        "network": row["wait_seconds"] - worker,
        "worker": worker,
        "all": crypto + row["wait_seconds"],
    }


def _kinds(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table by kind of layer, with the directions of each."""
    groups = list(groups)
    names: dict[str, list[str]] = {}
    for row in groups:
        name, mine = " + ".join(row["layers"]), names.setdefault(kind_of(row["layers"]), [])
        mine += [name] if name not in mine else []
    found: list[dict[str, Any]] = []
    for kind, directions in by_kind(groups).items():
        sums = zero()
        for row in directions.values():
            add_to(sums, row)
        parts = [
            {"direction": d, **row, "seconds": _seconds(row)} for d, row in sorted(directions.items(), reverse=True)
        ]
        found.append({"name": _name(kind, names[kind]), **sums, "seconds": _seconds(sums), "directions": parts})
    most = max((entry["seconds"]["all"] for entry in found), default=0.0)
    for entry in found:
        entry["share"] = entry["seconds"]["all"] / most if most else 0.0
    return sorted(found, key=lambda entry: -entry["seconds"]["all"])


def _name(kind: str, layers: Sequence[str]) -> str:
    """The name of a kind of layers, or the layers' own names where these say more."""
    return ", ".join(layers) if len(layers) == 1 or (len(layers) <= 8 and not kind.strip("*.{,}")) else kind


def _groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [{"place": i, **row, "seconds": _seconds(row)} for i, row in enumerate(groups)]
    shown = sorted(rows, key=lambda row: -row["seconds"]["all"])[:_ROWS]
    return {"rows": shown, "all": len(rows)}


def _thin(rows: Sequence[Any]) -> list[Any]:
    every = math.ceil(len(rows) / _ROWS) or 1
    kept = list(rows[::every])
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]
