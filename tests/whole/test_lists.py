"""Every package stands in each list of ``pyproject.toml`` that names packages, and every plugin in an entry point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOOL = PROJECT["tool"]
SOURCES = TOOL["hatch"]["build"]["dev-mode-dirs"]
FOLDERS = sorted(file.parent for source in SOURCES for file in (ROOT / source).glob("ciphertune*/__init__.py"))
PACKAGES = [folder.name for folder in FOLDERS]
PLUGINS = sorted(name for name in PACKAGES if name != "ciphertune")
CONTRACTS = {contract["name"]: contract for contract in TOOL["importlinter"]["contracts"]}


def test_the_wheel_has_every_package() -> None:
    assert sorted(TOOL["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(
        folder.relative_to(ROOT).as_posix() for folder in FOLDERS
    )
    assert {*SOURCES, "hatch_build.py"} <= {*TOOL["hatch"]["build"]["targets"]["sdist"]["include"]}


def test_imports_of_every_package_are_checked() -> None:
    assert sorted(TOOL["importlinter"]["root_packages"]) == sorted(PACKAGES)
    assert sorted(CONTRACTS["the core imports no plugin"]["forbidden_modules"]) == PLUGINS
    assert sorted(CONTRACTS["plugins never import each other"]["modules"]) == PLUGINS


def test_types_of_every_package_are_checked() -> None:
    checked = {file for pattern in TOOL["mypy"]["files"] for file in ROOT.glob(pattern)}
    assert all({folder, folder.parent} & checked for folder in FOLDERS)
    assert set(SOURCES) <= set(TOOL["mypy"]["mypy_path"].split(":"))


def test_every_plugin_is_an_entry_point_of_its_kind() -> None:
    named: dict[str, set[str]] = {}
    for group, entries in PROJECT["project"]["entry-points"].items():
        for value in entries.values():
            package = value.partition(":")[0].partition(".")[0]
            named.setdefault(package, set()).add(group.removeprefix("ciphertune."))
    assert sorted(named) == PLUGINS
    for folder in FOLDERS:
        if folder.name != "ciphertune":
            assert folder.parent.name in named[folder.name], folder.name
