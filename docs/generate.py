"""Writes the pages that are made from code: ``python docs/generate.py``. A test holds them equal to what it writes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ciphertune import hookspecs

DOCS = Path(__file__).parent
_HEAD = "<!-- Made by docs/generate.py from {source}; change it there. -->\n\n"


def _dedented(function: Callable[..., Any]) -> str:
    return inspect.cleandoc(function.__doc__ or "")


def _sections(docstring: str) -> str:
    """A Google-style docstring in Markdown: arguments become a list."""
    lines: list[str] = []
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif match := re.match(r"    (\w+): (.*)", line):
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
    return "".join(parts)


PAGES: dict[str, Callable[[], str]] = {"hooks.md": hooks}


if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
