"""The picture in docs/architecture.md: floors of ``core/ciphertune`` as pyproject.toml has them for import-linter."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
CORE = ROOT / "core" / "ciphertune"

# Whose process a room's code runs in, where it is one side's alone.
DATA_OWNER = {"client", "interleaving", "linear", "outsourcing", "training"}
WORKERS = {"worker"}

# Packages that are registered by entry point: what they are → their folder, and the module that they fill in.
OUTSIDE = {
    "hook plugins": ("plugins", "hookspecs"),
    "backends": ("backends", "backend"),
    "transports": ("transports", "transport"),
}

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOX = 620, 44, 440, 52, 46, 34
_STYLE = """
    @media (prefers-color-scheme: dark) { svg:root { color: #e6e6e6 } }
    .ar-owner { fill: #2f9e44; fill-opacity: .12; stroke: #2f9e44; stroke-width: 2 }
    .ar-worker { fill: #e8590c; fill-opacity: .12; stroke: #e8590c; stroke-width: 2 }
    .ar-either { fill: none; stroke: currentColor; stroke-width: 2; stroke-opacity: .45 }
    .ar-head { font-weight: 700; font-size: 17px }
    .ar-small { font-size: 13.5px }
    .ar-arrow { fill: none; stroke: currentColor; stroke-width: 2.5; stroke-opacity: .65 }
"""


def floors() -> list[list[str]]:
    """Rooms and front modules of the core by floor, top first, from the layers contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers" and c["containers"] == ["ciphertune"])
    return [re.split(r" [|:] ", layer) for layer in layers]


def is_room(name: str) -> bool:
    """Whether a name of the core is a folder and not a single module."""
    return (CORE / name).is_dir()


def draw() -> str:
    """The picture as SVG."""
    rows = floors()
    height = _TOP + len(rows) * _ROW + 74
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'font-size="15" fill="currentColor">\n  <!-- Made by docs/generate.py from pyproject.toml. -->\n'
        f"  <style>{_STYLE}  </style>",
        f'<text class="ar-head" x="{_LEFT}" y="30">core/ciphertune</text>',
        f'<text class="ar-head" x="{_RIGHT + 40}" y="30">by entry point</text>',
    ]
    bottom = _TOP + len(rows) * _ROW
    parts += [
        f'<path class="ar-arrow" d="M20 {_TOP}V{bottom - 18}m-7-9l7 10 7-10"/>',
        f'<text class="ar-small" transform="translate(15 {(_TOP + bottom) // 2}) rotate(-90)" text-anchor="middle">'
        "imports go down</text>",
    ]
    for number, names in enumerate(rows):
        parts += _floor(_TOP + number * _ROW, names)
    parts += _outside(rows)
    parts += _legend(bottom + 16)
    return "\n  ".join(parts) + "\n</svg>\n"


def _floor(y: int, names: list[str]) -> list[str]:
    # Modules that outside packages fill in are at the end, where arrows come in.
    filled = [module for _, module in OUTSIDE.values()]
    ordered = sorted(names, key=lambda name: (name in filled, not is_room(name)))
    labels = [name + ("/" if is_room(name) else ".py") for name in ordered]
    gap = 6
    lengths = [len(label) + 3 for label in labels]
    usable = _RIGHT - _LEFT - gap * (len(labels) - 1)
    parts, x = [], float(_LEFT)
    for name, label, length in zip(ordered, labels, lengths, strict=True):
        width = usable * length / sum(lengths)
        side = "ar-owner" if name in DATA_OWNER else "ar-worker" if name in WORKERS else "ar-either"
        parts += [
            f'<rect class="{side}" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{_BOX}" rx="7"/>',
            f'<text x="{x + width / 2:.0f}" y="{y + 22}" text-anchor="middle">{label}</text>',
        ]
        x += width + gap
    return parts


def _outside(rows: list[list[str]]) -> list[str]:
    """Packages outside of the core, each beside the floor of the module that it fills in."""
    parts: list[str] = []
    below, previous = -1.0, -1
    for what, (folder, module) in OUTSIDE.items():
        floor = next(number for number, names in enumerate(rows) if module in names)
        target = _TOP + floor * _ROW + _BOX / 2 + (6 if floor == previous else -6)
        previous = floor
        packages = sorted(
            path.name.removeprefix("ciphertune_")
            for path in (ROOT / folder).glob("ciphertune_*")
            if (path / "__init__.py").exists()
        )
        lines = _wrapped(packages, 19)
        size = 30 + 17 * len(lines)
        top = max(target - 0.7 * size, below + 10)
        below = top + size
        x = _RIGHT + 40
        parts += [
            f'<rect class="ar-either" x="{x}" y="{top:.0f}" width="{_WIDTH - x - 4}" height="{size}" rx="7" '
            'stroke-dasharray="3 4"/>',
            f'<text x="{x + 10}" y="{top + 20:.0f}" font-weight="700">{what}</text>',
            *(
                f'<text class="ar-small" x="{x + 10}" y="{top + 37 + 17 * number:.0f}">{line}</text>'
                for number, line in enumerate(lines)
            ),
            f'<path class="ar-arrow" d="M{x} {max(top + 16, min(target, below - 12)):.0f}L{_RIGHT + 5} {target:.0f}'
            f'm9-7l-9 7 9 6"/>',
        ]
    return parts


def _wrapped(words: list[str], width: int) -> list[str]:
    lines = [""]
    for number, word in enumerate(words):
        text = word + ("," if number + 1 < len(words) else "")
        if lines[-1] and len(lines[-1]) + 1 + len(text) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {text}".strip()
    return lines


def _legend(y: int) -> list[str]:
    entries = [("ar-owner", "runs at the data owner"), ("ar-worker", "runs at the workers"), ("ar-either", "either")]
    parts, x = [], _LEFT
    for side, text in entries:
        parts += [
            f'<rect class="{side}" x="{x}" y="{y}" width="20" height="16" rx="4"/>',
            f'<text class="ar-small" x="{x + 27}" y="{y + 13}">{text}</text>',
        ]
        x += 54 + 7 * len(text)
    parts.append(
        f'<text class="ar-small" x="{_LEFT}" y="{y + 40}">name/ is a folder (a room), name.py a front module</text>'
    )
    return parts
