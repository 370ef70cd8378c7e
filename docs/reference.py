"""References of contracts as pages that read in the repository as well: signatures and docstrings, from code."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

CORE = Path(__file__).parent.parent / "core" / "ciphertune"

Render = Callable[[str], str]
"""A docstring in Markdown."""


def module(path: str, render: Render, names: tuple[str, ...] = (), level: int = 2) -> str:
    """Public names of a module: constants, types, functions, and classes with their public members.

    Args:
        path: of the file, below ``core/ciphertune``.
        render: makes Markdown of a docstring.
        names: those to show; all if empty.
        level: of the headings.
    """
    body = ast.parse((CORE / path).read_text(encoding="utf-8")).body
    parts = []
    for name, node, told in _documented(body):
        if (names and name not in names) or name.startswith("_") or name.startswith("ciphertune_"):
            continue
        if isinstance(node, ast.ClassDef):
            parts.append(_class(node, render, level))
        elif isinstance(node, ast.FunctionDef):
            parts.append(f"{'#' * level} `{_signature(node, name)}`\n{render(_doc(node))}\n")
        elif told:
            parts.append(f"{'#' * level} `{ast.unparse(node)}`\n{render(told)}\n")
    return "\n".join(parts)


def _class(node: ast.ClassDef, render: Render, level: int) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    parts = [f"{'#' * level} `class {node.name}{f'({bases})' if bases else ''}`\n{render(_doc(node))}\n"]
    fields = [
        (name, part, told)
        for name, part, told in _documented(node.body)
        if isinstance(part, ast.AnnAssign) and not name.startswith("_")
    ]
    if fields:
        rows = [_field(part, render(told)) for _, part, told in fields]
        parts.append("\n".join(["**Types and defaults**\n", *rows]) + "\n")
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
            kinds = [ast.unparse(each).rpartition(".")[2] for each in part.decorator_list]
            said = [word for kind, word in _WORDS.items() if kind in kinds]
            note = f"*{', '.join(said)}*\n\n" if said else ""
            name = part.name if "property" not in kinds else ""
            returns = "" if part.returns is None else ast.unparse(part.returns)
            title = _signature(part, name) if name else f"{part.name}: {returns}"
            given = "" if "abstractmethod" in kinds else _given(part)
            parts.append(f"{'#' * (level + 1)} `{node.name}.{title}`\n{note}{render(_doc(part))}{given}\n")
    return "\n".join(parts)


def _given(node: ast.FunctionDef) -> str:
    """What a method gives that nobody overrides, where that is a value."""
    last = node.body[-1]
    if len(node.body) == 2 and isinstance(last, ast.Return) and isinstance(last.value, (ast.Constant, ast.Dict)):
        return f"\n\nNot overridden: `{ast.unparse(last.value)}`."
    return ""


def _field(node: ast.stmt, told: str) -> str:
    """An item of a list: the field, and what is said of it."""
    return f"- `{ast.unparse(node)}`{f': {told}' if told else ''}".replace("\n", "\n  ")


_WORDS = {
    "abstractmethod": "must be implemented",
    "classmethod": "class method",
    "staticmethod": "static method",
    "property": "property",
}


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt, str]]:
    """Names that a body defines, with their statements and the text that follows one that is an assignment."""
    for index, node in enumerate(body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name, node, ""
            continue
        target: ast.expr | None = None
        if isinstance(node, ast.AnnAssign):
            target = node.target
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        if isinstance(target, ast.Name):
            after = body[index + 1] if index + 1 < len(body) else None
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield target.id, node, inspect.cleandoc(text) if isinstance(text, str) else ""


def _signature(node: ast.FunctionDef, name: str) -> str:
    arguments = [argument for argument in node.args.posonlyargs + node.args.args if argument.arg not in ("self", "cls")]
    kept = ast.arguments(
        posonlyargs=[],
        args=arguments,
        vararg=node.args.vararg,
        kwonlyargs=node.args.kwonlyargs,
        kw_defaults=node.args.kw_defaults,
        kwarg=node.args.kwarg,
        defaults=node.args.defaults[-len(arguments) :] if arguments else [],
    )
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{name}({ast.unparse(kept)}){returns}"


def _doc(node: ast.ClassDef | ast.FunctionDef) -> str:
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    # Examples are run where they stand.
    return text.partition("\n\n>>> ")[0]
