"""Projects that ``ciphertune new`` writes. That they install and work when filled in: ``tests/wheel/wheel.sh``."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import follow
import pytest
from click.testing import CliRunner

from ciphertune.cli import cli
from ciphertune.cli.scaffold import GROUPS, Kind, new_project
from ciphertune.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS: list[Kind] = ["transport", "wrapping", "backend", "plugin"]
PAGES = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", KINDS)
def test_a_project(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "ciphertune-two-words"
    files = new_project(kind, "two-words", folder)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) == files
    assert {"pyproject.toml", "README.md", "tests/conftest.py", "tests/test_two_words.py"} <= set(map(str, files))
    assert {".gitignore", ".github/workflows/test.yml"} <= set(map(str, files))
    workflow = (folder / ".github/workflows/test.yml").read_text()
    assert "ciphertune check two-words" in workflow
    assert "${{ matrix.python }}" in workflow
    for file in files:
        text = (folder / file).read_text()
        assert "$" not in text.replace("${{", ""), file
        if file.suffix == ".py":
            ast.parse(text)
            assert all(len(line) <= 120 for line in text.splitlines()), file
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "ciphertune-two-words"
    assert project["project"]["dependencies"] == ["ciphertune>=0.1.0,<0.2"]
    (entry,) = project["project"]["entry-points"][GROUPS[kind]].items()
    assert entry[0] == "two-words"
    module, _, name = entry[1].partition(":")
    tree = ast.parse((folder / module / "__init__.py").read_text())
    (skeleton,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    assert "interface = 1" in map(ast.unparse, skeleton.body)


@pytest.mark.parametrize("name", ["", "Mine", "1st", "my_own", "a--b", "a-", "-a", "../a", "a b", "a/b", "ä"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no name"):
        new_project("backend", name, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "name"), [("backend", "mlwe"), ("wrapping", "zmq"), ("plugin", "history")])
def test_names_that_are_ciphertune_s_own(kind: Kind, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is the name of CipherTune's own"):
        new_project(kind, name, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "taken", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"exists already|cannot write"):
            new_project("backend", "mine", target)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    result = runner.invoke(cli, ["new", "transport", "wire"])
    assert result.exit_code == 0, result.output
    assert "ciphertune-wire/ciphertune_wire/__init__.py" in result.output
    assert (tmp_path / "ciphertune-wire" / "pyproject.toml").exists()
    result = runner.invoke(cli, ["new", "plugin", "eye", "--output", "there", "--json"])
    found = json.loads(result.stdout)
    assert found["folder"] == "there"
    assert all((tmp_path / "there" / file).exists() for file in found["files"])
    assert runner.invoke(cli, ["new", "planet", "x"]).exit_code == 2


def test_pages_are_followed_as_they_stand(tmp_path: Path) -> None:
    script = follow.script('```sh\nmkdir a\n```\n```python title="a/b.py"\nx = "$y"\n```\n```sh fails\nfalse\n```\n')
    assert "mkdir a" in script
    assert 'x = "$y"' in script
    assert "should have failed" in script
    with pytest.raises(ValueError, match="nothing"):
        follow.script("text\n```python\nx\n```\n")
    for page in ("write-a-transport.md", "write-a-backend.md", "write-a-plugin.md"):
        assert "ciphertune new" in follow.script((PAGES / page).read_text())
