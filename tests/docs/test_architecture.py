"""The page on architecture names every room and front module, and no file that is not there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "ciphertune"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = runpy.run_path(str(ROOT / "docs" / "floors.py"))

ROOMS = sorted(path.parent.name for path in CORE.glob("*/__init__.py"))
FRONT = sorted(path.name for path in CORE.glob("*.py"))


def cells(heading: str) -> list[str]:
    """The first cell of each row of the table below a heading."""
    section = re.split(r"^## ", PAGE, flags=re.M)
    table = next(part for part in section if part.startswith(heading + "\n"))
    return re.findall(r"^\| `([^`]+)` \|", table, re.M)


def test_every_room_and_front_module_has_a_row() -> None:
    assert len(ROOMS) > 10
    assert sorted(cells("Rooms")) == [f"{room}/" for room in ROOMS]
    assert sorted([*cells("Front modules"), "__init__.py", "__main__.py"]) == FRONT
    assert "`__init__.py`" in PAGE
    assert "`__main__.py`" in PAGE


def test_contributing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"`{room}/`" not in text] == []


def test_the_picture_has_every_room_and_front_module() -> None:
    drawn = {name for floor in FLOORS["floors"]() for name in floor}
    assert drawn == {*ROOMS, *(name.removesuffix(".py") for name in FRONT if not name.startswith("__"))}
    assert {*FLOORS["DATA_OWNER"], *FLOORS["WORKERS"]} <= drawn


def test_every_package_outside_of_the_core_is_named() -> None:
    for folder in ("backends", "transports", "plugins"):
        for package in (ROOT / folder).glob("ciphertune[-_]*"):
            if any(package.iterdir()):
                assert f"`{package.name}`" in PAGE, package


def test_every_file_and_folder_that_is_named_exists() -> None:
    named = re.findall(r"`([\w./-]+(?:/|\.py|\.toml))`", PAGE)
    assert len(named) > 60
    for name in named:
        assert any((base / name).exists() for base in (ROOT, CORE, CORE / "cli")), name


def test_every_function_of_a_named_file_exists() -> None:
    """`file.py`: `Class.method` means that the file defines them."""
    pairs = re.findall(r"`((?:core|backends|transports)/[\w./]+\.py)`: `(\w+)(?:\.(\w+))?`", PAGE)
    assert len(pairs) > 8
    for file, name, method in pairs:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b", text, re.M), (file, name)
        assert not method or re.search(rf"^    def {method}\b", text, re.M), (file, name, method)
