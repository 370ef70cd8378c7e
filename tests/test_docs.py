"""The documentation's code runs, its commands exist, and its links lead somewhere."""

import contextlib
import importlib.util
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ciphertune import plugin_manager, registry, session_of
from ciphertune.bundle import load_worker, split
from ciphertune.cli import cli
from ciphertune.service import Service
from ciphertune.worker import Worker

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])

# Pages on backends whose packages not every platform has.
NEEDS = {"concrete-circuit.md": "concrete"}

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Any]
) -> None:
    if page.name in NEEDS and importlib.util.find_spec(NEEDS[page.name]) is None:
        pytest.skip(f"{NEEDS[page.name]} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    namespace: dict[str, Any] = {}
    try:
        with workers(tiny("llama")) if page.name == "remote.md" else contextlib.nullcontext("") as addresses:
            for number, code in enumerate(blocks(page, "python"), 1):
                here = code.replace("10.0.0.5:5555,10.0.0.6:5555", addresses)
                exec(compile(here, f"{page.name}, block {number}", "exec"), namespace)
            if addresses:
                session_of(namespace["model"]).close()
    finally:
        manager = plugin_manager()
        if "audit" in manager.names():
            manager.unregister(manager._manager.get_plugin("audit"))


@contextlib.contextmanager
def workers(model: Any) -> Iterator[str]:
    """What remote.md takes for granted: a bundle and keys in this folder, and two workers."""
    split(model, "bundle")
    transport = registry.load(registry.TRANSPORTS, "zmq")
    transport.make_keys(Path("keys"), ("client",), worker=True)
    service = Service(Worker(load_worker("bundle/worker")))
    listeners = [transport.listen(service, "127.0.0.1:*", {"curve": "keys"}) for _ in range(2)]
    try:
        yield ",".join(listener.address for listener in listeners)
    finally:
        for listener in listeners:
            listener.close()
        service.close()


def test_commands_in_the_documentation_exist() -> None:
    runner = CliRunner()
    found = set()
    for page in PAGES:
        for line in re.findall(r"ciphertune ((?:bench )?[a-z]+)\b(?=[^\n]*)", "\n".join(blocks(page, "sh"))):
            found.add(line.strip())
    assert {"backends", "bench kernel", "bench train", "demo", "doctor", "train"} <= found
    for command in found:
        result = runner.invoke(cli, [*command.split(), "--help"])
        assert result.exit_code == 0, command


def test_pages_made_from_code_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert pages
    for page, make in pages.items():
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == make(), "run python docs/generate.py"


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"`?make ([a-z-]+)", "\n".join(blocks(page, "sh"))):
            assert target in targets, (page.name, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:docs|examples|benchmarks|tests|core|backends)/[\w./]+\.\w+)`", text):
        assert (ROOT / target).exists(), target
