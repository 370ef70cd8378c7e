"""The plots in docs/performance.md, of the measurements beside this file: ``python docs/generate.py`` draws them.

They are SVG whose lines and letters have the colour of the page that they stand in, or, alone, what the viewer prefers.
A comment in each names its source with a digest, so that a test can tell a plot that is out of date.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INK = "#010203"
"""Stands for the page's colour until the file is written."""
COLOURS = ("#e8590c", "#1c7ed6", "#2f9e44", "#ae3ec9", "#868e96")
STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "font.size": 12.5,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def _powers(axes: Any, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("tokens of a product, T")


def _ratios(found: Mapping[str, Any], figure: Any) -> None:
    """Evaluation, and all of it, over plaintext; tokens along, a line for every number of features."""
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    rows = [row for row in found["grid"] if row["to"] == "mlwe"]
    ticks = sorted({row["tokens"] for row in rows})
    for axes, name, title in zip(
        panels,
        ("evaluate_ratio", "total_ratio"),
        ("The worker's part: evaluate / plaintext", "Encrypt + evaluate + decrypt / plaintext"),
        strict=True,
    ):
        for colour, features in zip(COLOURS, sorted({row["in_features"] for row in rows}), strict=False):
            line = sorted((row["tokens"], row[name]) for row in rows if row["in_features"] == features)
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, label=f"K = N = {features:,}")
        axes.axhline(1, color=INK, linewidth=1, linestyle="--")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_title(title)
    _powers(panels[1], ticks)
    panels[0].legend(ncols=2)


def _losses(found: Mapping[str, Any], figure: Any) -> None:
    """Training losses, encrypted on top of plaintext."""
    runs = found["runs"]
    for axes, run in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        for part, label, look in (
            ("plaintext", "in the clear", {"color": COLOURS[4], "linewidth": 6, "alpha": 0.55}),
            ("encrypted", f"encrypted ({run['to']})", {"color": COLOURS[0], "linewidth": 1.6}),
        ):
            values = run[part]["losses"]
            axes.plot(range(1, len(values) + 1), values, label=label, **look)
        axes.set_title(f"{run['model']}: training loss")
        axes.set_xlabel(f"optimizer step of {run['per_step']:,} {run['unit']}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].legend()


def _compare(found: Mapping[str, Any], figure: Any) -> None:
    """Seconds and bytes of one product under every backend; pale where scaled up from a smaller one."""
    rows = [row for row in found["rows"] if "reason" not in row]
    names = [row["to"] for row in rows]
    large = [row["large"] for row in rows]
    seconds = [sum(item[f"{phase}_s"] for phase in ("encrypt", "evaluate", "decrypt")) for item in large]
    traffic = [(item["bytes_up"] + item["bytes_down"]) / 1e6 for item in large]
    panels = figure.subplots(2, 1, sharey=True)
    for axes, values, unit in zip(panels, (seconds, traffic), ("seconds", "megabytes up and down"), strict=True):
        bars = axes.barh(names, values, color=COLOURS[0])
        for bar, item, value in zip(bars, large, values, strict=True):
            about = "~" if item["scaled"] else ""
            if about:
                bar.set(alpha=0.45, hatch="//")
            axes.annotate(
                f" {about}{value:.0f}" if value >= 10 else f" {about}{value:.2g}",
                (value, bar.get_y() + bar.get_height() / 2),
                va="center",
                fontsize=11,
            )
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
    panels[0].invert_yaxis()
    panels[0].set_title(f"One product of {found['large']}; pale: scaled")


def _workers(found: Mapping[str, Any], figure: Any) -> None:
    """Seconds a step over workers, a line for every bandwidth, a panel for every model."""
    rows = found.get("table", {"rows": []})["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    counts = sorted({row["workers"] for row in rows})
    for axes, model in zip(
        figure.subplots(max(1, len(models)), 1, sharex=True, squeeze=False)[:, 0], models, strict=False
    ):
        for colour, bandwidth in zip(COLOURS, dict.fromkeys(row["bandwidth"] for row in rows), strict=False):
            line = [(r["workers"], r["seconds"]) for r in rows if (r["model"], r["bandwidth"]) == (model, bandwidth)]
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, label=bandwidth)
        axes.set_yscale("log")
        axes.set_title(f"{model}: seconds a step, predicted")
    last = figure.axes[-1]
    last.set_xscale("log", base=2)
    last.set_xticks(counts, [str(count) for count in counts])
    last.set_xlabel("workers")
    figure.axes[0].legend()


# Name of the plot → the measurements it is made of, how, and its size in inches.
PLOTS: dict[str, tuple[str, Callable[[Mapping[str, Any], Any], None], tuple[float, float]]] = {
    "ratios": ("sweep.json", _ratios, (6, 6.4)),
    "losses": ("losses.json", _losses, (6, 6.4)),
    "compare": ("compare.json", _compare, (6, 5.6)),
    "workers": ("predict.json", _workers, (6, 6.4)),
}


def present() -> list[str]:
    """The plots whose measurements are there."""
    return [name for name, (source, _, _) in PLOTS.items() if (HERE / source).exists()]


def made_of(name: str) -> str:
    """What a plot that is up to date says of its source."""
    source = PLOTS[name][0]
    digest = hashlib.sha256((HERE / source).read_bytes()).hexdigest()
    return f"<!-- Made by benchmarks/plots.py of benchmarks/{source}, sha256 {digest} -->"


def draw(name: str) -> str:
    """A plot as SVG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    source, paint, size = PLOTS[name]
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        paint(json.loads((HERE / source).read_text(encoding="utf-8")), figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue().replace(INK, "currentColor")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", svg)
    svg = re.sub(r"<\?xml.*?<svg ", "<svg ", svg, count=1, flags=re.S)
    svg = re.sub(r" width=\"[\d.]+pt\"| height=\"[\d.]+pt\"", "", svg, count=2)
    # As an attribute: a style sheet would reach every picture of the page.
    svg = re.sub(r"\s*<style type=\"text/css\">\*\{([^}]*)\}</style>", "", svg, count=1)
    svg = svg.replace("<svg ", '<svg style="stroke-linejoin: round; stroke-linecap: butt" ', 1)
    dark = "<style>@media (prefers-color-scheme: dark) { svg:root { color: #e6e6e6 } }</style>"
    svg = re.sub(r"(<svg [^>]*>)", rf"{made_of(name)}\n\1\n {dark}", svg, count=1)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
