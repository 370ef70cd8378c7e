"""The plot of the training loss."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ciphertune._support.atomic import replace_file
from ciphertune._support.optional_imports import import_optional

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#8a8f98", "linewidth": 5, "alpha": 0.55},
    {"color": "#d9480f", "linewidth": 1.6, "marker": "o"},
)


def plot_losses(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Loss over optimizer steps as a PNG, the first curve broad and the second on top of it.

    Raises:
        ConfigError: matplotlib is missing.
    """
    import_optional("matplotlib", 'pip install "ciphertune[demo]"')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, losses), style in zip(curves.items(), _STYLES, strict=False):
        axes.plot(range(1, len(losses) + 1), losses, label=name, markersize=4, **style)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (cross-entropy, nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(path, buffer.getvalue())
