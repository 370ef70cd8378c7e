"""Plugins outside the wheel, the templates of ``ciphertune new`` and the pages on plugins use the front alone."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import ciphertune

ROOT = Path(__file__).parents[2]
SCAFFOLD = ROOT / "core" / "ciphertune" / "cli" / "scaffold"
FRONT = {
    "ciphertune",
    "ciphertune.backend",
    "ciphertune.callers",
    "ciphertune.errors",
    "ciphertune.hookspecs",
    "ciphertune.key_files",
    "ciphertune.protocol",
    "ciphertune.selection",
    "ciphertune.testing",
    "ciphertune.testing.fixtures",
    "ciphertune.tracker",
    "ciphertune.traffic",
    "ciphertune.transport",
    "ciphertune.weights",
}
_FENCE = re.compile(r"^```(?:python|py)\b[^\n]*\n(.*?)^```$", re.M | re.S)
_WORDS = {"name": "sample", "module": "ciphertune_sample", "title": "Sample", "version": "0.1.0", "next": "0.2"}


def sources() -> Iterator[tuple[str, str]]:
    """Every piece of Python that third parties write or copy: where it stands, and its text."""
    for file in sorted(ROOT.glob("plugins/ciphertune-*/**/*.py")):
        yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
    for file in sorted(SCAFFOLD.rglob("*.py.tmpl")):
        yield str(file.relative_to(ROOT)), string.Template(file.read_text(encoding="utf-8")).substitute(_WORDS)
    for page in sorted(ROOT.glob("docs/write-a-*.md")):
        for number, block in enumerate(_FENCE.findall(page.read_text(encoding="utf-8")), 1):
            yield f"{page.relative_to(ROOT)}, block {number}", block


def ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "ciphertune"


@functools.cache
def public_names(module: str) -> set[str]:
    """What a front module exports, or defines itself; not what it imports."""
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return set(found.__all__)
    names: set[str] = set()
    for node in ast.parse(Path(str(found.__file__)).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def is_in_front(module: str, name: str) -> bool:
    """Whether ``from module import name`` stays in the front."""
    return f"{module}.{name}" in FRONT or (module in FRONT and name in public_names(module))


def strays(text: str) -> list[str]:
    """What a piece of Python takes from CipherTune that is not in the front."""
    found: list[str] = []
    loaded = {"ciphertune"}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if ours(alias.name)}
            loaded |= names
            found += sorted(names - FRONT)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None and ours(node.module):
            loaded.add(node.module)
            found += [f"{node.module}.{a.name}" for a in node.names if not is_in_front(node.module, a.name)]
    for node in ast.walk(tree):
        # Of the package itself only what it exports can be relied on, or a module that is imported here.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ciphertune":
            name = f"ciphertune.{node.attr}"
            if node.attr not in ciphertune.__all__ and name not in loaded:
                found.append(name)
    return found


@pytest.mark.parametrize(("where", "text"), [pytest.param(*each, id=each[0]) for each in sources()])
def test_third_parties_import_the_front_alone(where: str, text: str) -> None:
    assert strays(text) == [], f"{where} uses what is not in a front module"


def test_all_kinds_of_sources_are_looked_at() -> None:
    places = [where for where, text in sources() if "ciphertune" in text]
    for part in ("plugins/ciphertune-http/", "plugins/ciphertune-ckks/", "plugins/ciphertune-slalom/"):
        assert any(part in place for place in places), part
    for part in ("scaffold/backend/", "scaffold/plugin/", "scaffold/transport/"):
        assert any(part in place for place in places), part
    for part in ("write-a-backend.md", "write-a-plugin.md", "write-a-transport.md"):
        assert any(part in place for place in places), part


@pytest.mark.parametrize(
    ("text", "stray"),
    [
        ("import ciphertune.plugins.manager", "ciphertune.plugins.manager"),
        ("from ciphertune.client.session import Session", "ciphertune.client.session.Session"),
        ("from ciphertune import plugins", "ciphertune.plugins"),
        ("from ciphertune.transport import _Answer", "ciphertune.transport._Answer"),
        ("from ciphertune.transport import settle", "ciphertune.transport.settle"),
        ("from ciphertune.transport import threading", "ciphertune.transport.threading"),
        ("from ciphertune.transport import Message", "ciphertune.transport.Message"),
        ("import ciphertune\nciphertune.hookspecs.hookimpl", "ciphertune.hookspecs"),
        ("def f():\n    from ciphertune.worker import service", "ciphertune.worker.service"),
    ],
)
def test_what_is_no_front_is_found(text: str, stray: str) -> None:
    assert strays(text) == [stray]


def test_front_modules_are_there() -> None:
    for module in sorted(FRONT):
        importlib.import_module(module)
