"""Layout of line charts for a template: paths in a square of 1000, labels in per cent of it.

The page draws paths in an SVG that is stretched to its frame, and sets labels beside it as text, so that lines keep
their width and text its size on any screen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

_POINTS = 1500
_MARKED = 60
_FAR = 20.0


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend.
        style: CSS class.
        x, y: finite numbers, equally many.
        marks: whether points are marked even where there are many.
    """

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve to draw: the path of its line, and of dots at its points, empty where there are too many."""

    name: str
    style: str
    path: str
    dots: str


@dataclasses.dataclass(frozen=True)
class Tick:
    """A label at a place, in per cent from the left or from the bottom."""

    text: str
    place: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """A laid-out chart: lines to draw, and labels of both axes."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def chart(series: Sequence[Series], *, from_zero: bool = False) -> Chart | None:
    """Lay out curves in a chart; None where there is no point to draw.

    Args:
        series: curves; those without points are left out.
        from_zero: let the vertical axis begin at 0, or have powers of ten where curves lie that far apart.
    """
    series = [s for s in series if len(s.x)]
    if not series:
        return None
    x_low, x_high = _range([v for s in series for v in s.x])
    values = [v for s in series for v in s.y]
    powers = from_zero and len(series) > 1 and min(values) > 0 and max(values) > _FAR * min(values)
    if powers:
        series = [dataclasses.replace(s, y=[math.log10(v) for v in s.y]) for s in series]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        y_ticks = [float(n) for n in range(low, high + 1)]
    else:
        y_ticks = nice_ticks(*_range(values + [0.0] * from_zero))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def places(s: Series) -> list[tuple[float, float]]:
        return [
            (1000 * (x - x_low) / (x_high - x_low), 1000 - 1000 * (y - y_low) / (y_high - y_low))
            for x, y in _thinned(s.x, s.y)
        ]

    x_ticks = [t for t in nice_ticks(x_low, x_high, whole=True) if x_low <= t <= x_high]
    return Chart(
        tuple(_line(s, places(s)) for s in series),
        tuple(Tick(_label(t), 100 * (t - x_low) / (x_high - x_low)) for t in x_ticks),
        tuple(Tick(_label(10**t if powers else t), 100 * (t - y_low) / (y_high - y_low)) for t in y_ticks),
    )


def nice_ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers, about ``count`` of them, from at most ``low`` to at least ``high``.

    >>> nice_ticks(0.13, 0.97)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> nice_ticks(1, 4, whole=True)
    [1.0, 2.0, 3.0, 4.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _label(value: float) -> str:
    """Format the label of a tick, which has little room.

    >>> _label(0.0002), _label(2500), _label(25000)
    ('0.0002', '2500', '25k')
    """
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.10g}{letter}"
    return f"{value:.10g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value, moved apart where they are almost the same."""
    low, high = min(values), max(values)
    # Closer than this, labels would not differ.
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    return (low, high) if high - low >= least else (low - max(abs(low) / 2, least), high + max(abs(high) / 2, least))


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """The points; of too many, the least and the greatest of every stretch."""
    points = list(zip(x, y, strict=True))
    if len(points) <= _POINTS:
        return points
    stretch = math.ceil(len(points) / (_POINTS // 2))
    kept = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return sorted({points[0], *kept, points[-1]})


def _line(series: Series, places: Sequence[tuple[float, float]]) -> Line:
    text = [f"{x:.1f} {y:.1f}" for x, y in places]
    # A line of no length with round ends is a dot that stretching leaves round.
    marked = series.marks or len(text) <= _MARKED
    return Line(series.name, series.style, "M" + "L".join(text), "".join(f"M{t}h0" for t in text) if marked else "")
