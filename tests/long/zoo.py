"""Looks at every architecture of the installed transformers: ``make zoo`` writes docs/models.md of what it finds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _helpers  # noqa: F401
import architectures
import torch
import transformers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
MEMORY = 12 << 30
"""Bytes of address space that the process of one architecture may have."""

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

_REST = """
## Not looked at
{count} more have no small model that computes in the clear, here or with these inputs, so nothing is known of them.

| architecture | class | why |
| --- | --- | --- |
"""


def look(names: list[str]) -> Iterator[architectures.Found]:
    """What comes of some architectures, each in a process of its own: one that ends it, or hangs, is a failure."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    every = architectures.architectures()
    # What all of them import, they import once.
    architectures.look("llama", every["llama"])
    for name in names:
        yield _look_apart(name, every[name])


def _look_apart(name: str, model: str) -> architectures.Found:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            with os.fdopen(writing, "w") as file:
                file.write(json.dumps(dataclasses.asdict(architectures.look(name, model))))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        hung = not select.select([file], [], [], 10 * architectures.SECONDS)[0]
        if hung:
            os.kill(child, signal.SIGKILL)
        line = file.read()
    _, status = os.waitpid(child, 0)
    if line:
        return architectures.Found(**json.loads(line))
    why = "it hung" if hung else f"the process ended with {os.waitstatus_to_exitcode(status)}"
    return architectures.Found(name, model, "fails", detail=why)


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
    text += _REST.format(count=len(rest))
    return text + "".join(f"| {each.architecture} | `{each.model}` | {_cell(_why(each.detail))} |\n" for each in rest)


def _why(detail: str) -> str:
    """Why no model is built, in short."""
    if package := re.search(r"requires the (\w+) library", detail):
        return f"needs the package {package[1]}"
    if "inference_session" in detail:
        return "is called with a session of inference, which holds what it saw of a video"
    if "_forward_unimplemented" in detail:
        return "has no forward pass of its own"
    if "module transformers has no attribute" in detail:
        return "transformers does not export the class that it names"
    return detail


def read_page() -> list[architectures.Found]:
    """What the page says was found; errors and shares as it rounds them."""
    every = architectures.architectures()
    found = []
    for line in PAGE.read_text().splitlines():
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
        elif len(cells) == 3 and cells[0] in every:
            found.append(architectures.Found(cells[0], cells[1].strip("`"), "not built", detail=cells[2]))
    return found


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
        for each in look(options.look):
            _say(json.dumps(dataclasses.asdict(each)))
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
    for each in look(names):
        found.append(each)
        with options.found.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(each)) + "\n")
        if len(found) % 32 == 0 or len(found) == len(names):
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
