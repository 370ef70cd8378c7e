"""The build hook compiles the loops, once for the same sources, and never leaves a library of others."""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOOK = Path(__file__).parents[2] / "hatch_build.py"
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo 'a compiler, {version}'; exit; fi
echo "$@" >> {calls}
case "$*" in {accepted}) ;; *) echo 'no such instruction' >&2; exit 1;; esac
while [ "$1" != -o ]; do shift; done
cat {sources} > "$2"
"""


class Hook:
    def __init__(self, root: str) -> None:
        self.root = root
        self.app = types.SimpleNamespace(display_warning=lambda text: None)

    @classmethod
    def __class_getitem__(cls, item: Any) -> type[Hook]:
        return cls


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Builds a checkout whose compiler puts the sources together; how often that was called."""
    interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = Hook  # type: ignore[attr-defined]
    parts = interface.__name__.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.delenv("CIPHERTUNE_BUILD_NATIVE", raising=False)
    native = tmp_path / "backends" / "ciphertune_mlwe" / "native"
    native.mkdir(parents=True)
    for name in ("kernels.c", "product.c", "team.c"):
        (native / name).write_text(name)
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    monkeypatch.setenv("CC", str(compiler))
    hook = runpy.run_path(str(HOOK))["NativeBuildHook"](str(tmp_path))

    def run(version: str = "1", accepted: str = "*") -> int:
        calls.write_text("")
        sources = f"{native}/kernels.c {native}/product.c {native}/team.c"
        compiler.write_text(COMPILER.format(version=version, calls=calls, accepted=accepted, sources=sources))
        compiler.chmod(0o755)
        hook.initialize("standard", {"artifacts": []})
        assert not list(native.glob("*.tmp"))
        return len(calls.read_text().splitlines())

    return run


def test_what_was_made_of_the_same_is_kept(build: Callable[..., int], tmp_path: Path) -> None:
    native = tmp_path / "backends" / "ciphertune_mlwe" / "native"
    assert [build(), build()] == [1, 0]
    (native / "product.c").write_text("another")
    assert [build(), build()] == [1, 0]
    assert (native / "kernels.so").read_text() == "kernels.canotherteam.c"
    assert [build(version="2"), build(version="2")] == [1, 0]
    (native / "kernels.so").write_text("somebody else's")
    assert build(version="2") == 1
    (native / "kernels.so").unlink()
    assert build(version="2") == 1
    assert (native / "kernels.so").read_text() == "kernels.canotherteam.c"


def test_a_compiler_that_is_too_old_or_fails(build: Callable[..., int], tmp_path: Path) -> None:
    library = tmp_path / "backends" / "ciphertune_mlwe" / "native" / "kernels.so"
    # Plain C is made anew every time: the next compiler may do better.
    assert [build(accepted="*-DCT_PLAIN*") for _ in range(2)] == [2, 2]
    assert library.read_text() == "kernels.cproduct.cteam.c"
    assert build(accepted="nothing") == 2
    assert not library.exists()
    assert build() == 1
