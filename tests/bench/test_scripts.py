"""The scripts in ``benchmarks/``: they start, and what they import is there, in the programs that they start, too."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
# Packages that not every environment has.
OPTIONAL = {"concrete_ml_extensions", "concrete", "estimator", "matplotlib", "ray"}


def imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; skipped where a package of another environment is missing."""
    # Under a name of its own: a helper of the tests may be called like it.
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        if (error.name or "").partition(".")[0] in OPTIONAL:
            pytest.skip(f"no {error.name} here")
        raise


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = imported(path, monkeypatch)
    if "__main__" not in path.read_text(encoding="utf-8"):
        return  # a module of others
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")


def trees(path: Path) -> Iterator[ast.AST]:
    """A script, and the programs in its texts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in node.value:
            try:
                yield ast.parse(node.value)
            except SyntaxError:
                continue


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_takes_of_the_project_is_there_and_public(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(path, monkeypatch)
    for tree in trees(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ciphertune"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name} (line {node.lineno})"
                    assert not name.name.startswith("_"), f"{name.name} is private to {node.module}"
            elif isinstance(node, ast.Import):
                for name in node.names:
                    if name.name.startswith("ciphertune"):
                        importlib.import_module(name.name)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_functions_of_a_script_get_what_they_take(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong call may come after an hour of measuring."""
    script = imported(path, monkeypatch)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        called = getattr(script, node.func.id, None)
        names = [keyword.arg for keyword in node.keywords]
        if called is None or None in names or any(isinstance(each, ast.Starred) for each in node.args):
            continue
        try:
            signature = inspect.signature(called)
        except ValueError:  # of some that are built in
            continue
        try:
            signature.bind(*node.args, **dict.fromkeys(filter(None, names)))
        except TypeError as error:
            pytest.fail(f"{path.name}, line {node.lineno}: {node.func.id}: {error}")


def test_programs_in_texts_are_looked_at() -> None:
    counts = {path.stem: len(list(trees(path))) for path in SCRIPTS}
    assert min(counts["scale"], counts["separate"], counts["split_memory"]) >= 2
