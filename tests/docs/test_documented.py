"""Nothing public without a place in the pages: names, options, hooks, commands, keys, environment variables."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import ciphertune
from ciphertune import hookspecs
from ciphertune.cli import cli
from ciphertune.selection import SessionOptions

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SETTINGS = runpy.run_path(str(DOCS / "settings.py"))
# What a person wrote, or docs/generate.py made and a person can read in the repository.
WRITTEN = "\n".join(
    page.read_text(encoding="utf-8") for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
)


def missing(names: Iterable[str], text: str = WRITTEN) -> list[str]:
    """Names that no code in a page has."""
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.M | re.S))
    return [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", code)]


def section(page: str, heading: str) -> str:
    parts = re.split(r"^## ", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
    return next(part for part in parts if part.startswith(heading + "\n"))


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with its path, groups left out."""
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found, (*path, name))


def test_what_is_missing_is_found() -> None:
    text = "words outsource\n`outsource_all` and `x-restore`\n```sh\nciphertune split\n```\n"
    assert missing(["outsource", "split", "restore", "outsource_all"], text) == ["outsource", "restore"]


def test_public_names() -> None:
    assert missing(ciphertune.__all__) == []


def test_front_modules_have_pages_of_their_own() -> None:
    pytest.importorskip("mkdocs", reason="docs/site.py is a hook of MkDocs")
    site = runpy.run_path(str(DOCS / "site.py"))
    pages: dict[str, tuple[str, list[str]]] = site["interface"]()
    for module in site["FRONT"]:
        title, paths = pages[f"api/{module}.md"]
        assert title
        home = f"ciphertune.{module}"
        tree = ast.parse((ROOT / "core" / "ciphertune" / f"{module}.py").read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        assert {f"{home}.{node.name}" for node in classes} <= set(paths)
        assert all(ast.get_docstring(node) for node in classes)
    everything = {path for _, paths in pages.values() for path in paths}
    homes = {f"ciphertune.{module}.{name}" for name, module in ciphertune._HOMES.items()}
    assert homes <= everything


OPTIONS = [(part, heading, owner) for part, owners in SETTINGS["options"]().items() for heading, owner in owners]
PARTS = {"selection": "Selection strings", "serve": "Workers", "plugins": "Hook plugins"}


@pytest.mark.parametrize(("part", "heading", "owner"), OPTIONS, ids=lambda value: getattr(value, "__name__", None))
def test_options(part: str, heading: str, owner: type) -> None:
    text = section("configuration.md", PARTS[part])
    tables = text.split(f"**{heading}**\n")
    assert len(tables) == 2, heading
    table = tables[1].split("\n**")[0]
    for field in dataclasses.fields(owner):
        row = re.search(rf"^\| `{field.name}` \| [^|]+ \| (.+) \|$", table, re.M)
        assert row, (heading, field.name)


def test_every_plugin_with_options_is_there() -> None:
    """The page is not made of a list that leaves some out."""
    folders = ("core", "backends", "transports", "plugins")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if "ciphertune-" not in str(file)]
    named = set()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named |= {n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Options")}
    assert len(named) > 10
    # Of a transport for tests, and of one within a suite.
    assert named - {owner.__name__ for _, _, owner in OPTIONS} <= {"FaultyOptions", "_InnerOptions"}


@pytest.mark.parametrize("plugin", sorted(ROOT.glob("plugins/ciphertune-*")), ids=lambda path: path.name)
def test_options_of_distributions_of_their_own(plugin: Path) -> None:
    readme = (plugin / "README.md").read_text(encoding="utf-8")
    for file in plugin.glob("ciphertune_*/*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
                fields = [
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                ]
                assert missing(fields, readme) == [], (file, node.name)


@pytest.mark.parametrize(
    ("title", "name"), [("A run's file", "SECTIONS"), ("A worker's file", "WORKER_SECTIONS")], ids=["run", "worker"]
)
def test_keys_of_files(title: str, name: str) -> None:
    text = section("configuration.md", title)
    for heading, owner in SETTINGS[name].items():
        shown = heading if heading[0] != "[" else f"`{heading}`"
        assert f"**{shown}**" in text
        sections = {cls.__name__ for cls in SETTINGS[name].values()}
        sections |= {form for each in sections for form in (f"tuple[{each}, ...]", f"{each} | None")}
        for field in dataclasses.fields(owner):
            if field.type not in sections:
                assert f"| `{field.name}` |" in text, (heading, field.name)


def test_hooks() -> None:
    names = [name for name in vars(hookspecs) if name.startswith("ciphertune_")]
    assert len(names) > 5
    for name in names:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
        assert f"\n## `{name}({arguments})`\n" in (DOCS / "hooks.md").read_text(encoding="utf-8")


def test_commands() -> None:
    paths = [path for path, _ in commands()]
    assert {"train", "bench kernel", "ray up"} <= set(paths)
    assert missing([f"ciphertune {path}" for path in paths]) == []


def test_options_of_commands() -> None:
    """The page of the command line shows the help of every command: options without one are named elsewhere."""
    assert ":list_subcommands: true" in (DOCS / "cli.md").read_text(encoding="utf-8")
    silent: dict[str, list[str]] = {}
    for path, command in commands():
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not (parameter.help or parameter.hidden):
                silent.setdefault(path, []).append(max(parameter.opts, key=len))
    assert {path: found for path, names in silent.items() if (found := missing(names))} == {}


def test_environment_variables() -> None:
    folders = ("core", "backends", "transports", "plugins")
    files: list[Path] = [ROOT / "hatch_build.py", *(f for folder in folders for f in (ROOT / folder).rglob("*.py"))]
    read: set[str] = set()
    for file in files:
        read |= set(re.findall(r"\bCIPHERTUNE_[A-Z_]+\b", file.read_text(encoding="utf-8")))
    assert "CIPHERTUNE_KEYS" in read
    text: Any = section("configuration.md", "Environment variables")
    assert missing(sorted(read), text) == []


@pytest.mark.parametrize("module", ["backend", "transport", "protocol"])
def test_contracts_read_in_the_repository(module: str) -> None:
    """Every public class, method and function of a contract is on its page, with its signature."""
    text = (DOCS / f"reference-{module}.md").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "core" / "ciphertune" / f"{module}.py").read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")]
    assert len(public) > 5
    for node in public:
        assert re.search(rf"^## `(class )?{node.name}\b", text, re.M), node.name
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                assert re.search(rf"^### `{node.name}\.{part.name}\b", text, re.M), (node.name, part.name)


def test_options_of_every_selection_string_are_in_the_reference_of_transports() -> None:
    text = section("reference-transport.md", "Options common to all transports")
    for field in dataclasses.fields(SessionOptions):
        assert f"| `{field.name}` |" in text
