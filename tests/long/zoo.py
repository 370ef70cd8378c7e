"""Looks at every architecture of the installed transformers: ``make zoo`` writes docs/models.md of what it finds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import _helpers  # noqa: F401
import architectures
import torch
import transformers

HERE = Path(__file__)
ROOT = HERE.parents[2]
PAGE = ROOT / "docs" / "models.md"
AT_ONCE = 32
"""Architectures that one process looks at: what a model leaves in memory goes with it."""
_SECONDS = 3 * architectures.SECONDS * AT_ONCE

_HEAD = """# Models

<!-- Made by make zoo, from tests/long/zoo.py; change it there. -->

Small models of every architecture that transformers {version} builds from a configuration on a CPU, with weights
drawn at random. Each is outsourced with the defaults, in float32 (`clear`), and compared with the same model in the
clear, forward and backward. So the table says whether an architecture computes the same; what an encryption adds is
[on a page of its own](mlwe.md). Where a model takes several kinds of input, it gets its main one.

{total} architectures: {matches} match ({percent:.1f}%), {refused} are refused by name, {deviates} deviate,
{fails} fail.

- **errors**: relative, the largest over all outputs, and over all gradients of parameters that stay. Gradients that
  are zero but for rounding count against the largest. A dash stands where nothing was compared. Where a result lies
  above 1e-3, the plain model with weights that differ in their last bit is as far off.
- **share**: outsourced weights over those of all linear layers and stacked experts of the small model. Heads weigh
  more in a small model than in a real one.
- **stays**: how many layers stay, the first of them, and why.

| architecture | class | verdict | forward error | backward error | share | stays |
| --- | --- | --- | --- | --- | --- | --- |
"""


def look(names: list[str]) -> None:
    """Print what comes of some architectures, a line of JSON each."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    every = architectures.architectures()
    for name in names:
        _say(json.dumps(dataclasses.asdict(architectures.look(name, every[name]))))


def look_apart(names: list[str]) -> list[architectures.Found]:
    """What comes of some architectures, in a process of their own. One that ends it is a failure."""
    command = [sys.executable, str(HERE), "--look", *names]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        lines, why = ended.stdout, f"the process ended with {ended.returncode}"
    except subprocess.TimeoutExpired as expired:
        lines, why = (expired.stdout or b"").decode() if isinstance(expired.stdout, bytes) else "", "it hung"
    found = [architectures.Found(**json.loads(line)) for line in lines.splitlines() if line.startswith("{")]
    if len(found) == len(names):
        return found
    lost = names[len(found)]
    found.append(architectures.Found(lost, architectures.architectures()[lost], "fails", detail=why))
    rest = names[len(found) :]
    return found + (look_apart(rest) if rest else [])


def page(found: list[architectures.Found]) -> str:
    """docs/models.md."""
    built = [each for each in found if each.verdict != "not built"]
    counts = Counter(each.verdict for each in built)
    text = _HEAD.format(
        version=transformers.__version__,
        total=len(built),
        matches=counts["matches"],
        percent=100 * counts["matches"] / max(len(built), 1),
        refused=counts["refused"],
        deviates=counts["deviates"],
        fails=counts["fails"],
    )
    for each in built:
        stays = (each.detail if each.verdict != "matches" else each.stays) or "nothing"
        text += (
            f"| {each.architecture} | `{each.model}` | {each.verdict} | {_number(each.forward)} | "
            f"{_number(each.backward)} | {_percent(each.share)} | {_cell(stays)} |\n"
        )
    rest = [each for each in found if each.verdict == "not built"]
    text += (
        f"\n## Not looked at\nOf {len(rest)} more no small model computes in the clear with inputs that are made by "
        "rule: they need another package, inputs of their own, or sizes that fit each other in ways of their own. "
        "Nothing is known of them here: "
    )
    return text + ", ".join(f"`{each.architecture}`" for each in rest) + ".\n"


def read_page() -> list[architectures.Found]:
    """What the page says was found; errors and shares as it rounds them."""
    table, _, rest = PAGE.read_text().partition("\n## Not looked at\n")
    every = architectures.architectures()
    found = []
    for line in table.splitlines():
        cells = [
            cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        ]
        if len(cells) == 7 and cells[0] in every:
            name, model, verdict, forward, backward, share, stays = cells
            ahead, back = (None if each == "–" else float(each) for each in (forward, backward))
            of_all = None if share == "–" else float(share.removesuffix("%")) / 100
            told = "" if stays == "nothing" else stays
            kept, detail = (told, "") if verdict == "matches" else ("", told)
            kind: Any = verdict
            found.append(architectures.Found(name, model.strip("`"), kind, ahead, back, of_all, kept, detail))
    return found + [architectures.Found(name, every[name], "not built") for name in re.findall(r"`([^`]+)`", rest)]


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Look at all, or at some, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--look", nargs="+", metavar="NAME", help="print what comes of these, and write nothing")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="look at one of N parts, for several at once")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", help="write the page of what was found before")
    parser.add_argument("--found", type=Path, default=ROOT / "build" / "zoo.jsonl", help="what was found, kept here")
    parser.add_argument("--add", nargs="+", type=Path, metavar="FILE", help="add what --look printed to the page")
    options = parser.parse_args()
    if options.look:
        look(options.look)
        return
    if options.write:
        lines = [line for file in options.write for line in file.read_text().splitlines()]
        PAGE.write_text(
            page(sorted((architectures.Found(**json.loads(line)) for line in lines), key=lambda f: f.architecture))
        )
        return
    if options.add:
        known = {each.architecture: each for each in read_page()}
        for line in (line for file in options.add for line in file.read_text().splitlines()):
            added = architectures.Found(**json.loads(line))
            known[added.architecture] = added
        PAGE.write_text(page(sorted(known.values(), key=lambda each: each.architecture)))
        return
    part, parts = map(int, options.part.split("/"))
    names = list(architectures.architectures())[part::parts]
    found: list[architectures.Found] = []
    options.found.parent.mkdir(exist_ok=True)
    options.found.write_text("")
    for start in range(0, len(names), AT_ONCE):
        new = look_apart(names[start : start + AT_ONCE])
        found += new
        with options.found.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(each)) + "\n" for each in new)
        _say(f"{len(found)} of {len(names)}: {dict(Counter(each.verdict for each in found))}")
    if parts == 1:
        PAGE.write_text(page(found))
    worst = [each for each in found if each.verdict in ("deviates", "fails")]
    for each in worst:
        _say(f"{each.architecture}: {each.verdict}: {each.forward} {each.backward} {each.detail}")
    sys.exit(bool(worst))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
