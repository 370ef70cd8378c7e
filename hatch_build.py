"""Build hook: compile the mlwe backend's loops where a C compiler is found; without one the portable code runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("backends/ciphertune_mlwe/native")
_SOURCES = ("kernels.c", "product.c", "team.c")
# No contraction: the same integers as the portable code on every machine.
_FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"]
# What kernels.so was made of, and its own hash: builds of one checkout, which are several in `make test`, compile once.
_RECORD = Path("build/kernels.sha256")


class NativeBuildHook(BuildHookInterface[Any]):
    """Adds ``kernels.so`` to wheels and editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; on failure say so and build a pure wheel."""
        root = Path(self.root)
        target = root / _FOLDER / "kernels.so"
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if os.environ.get("CIPHERTUNE_BUILD_NATIVE") == "0" or not compiler or sys.platform == "win32":
            self.app.display_warning("ciphertune: no native loops in this build; the portable code will be used")
            target.unlink(missing_ok=True)
            return
        self._compile(compiler.split(), root, target)
        if not target.exists():
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(str(_FOLDER / "kernels.so"))

    def _compile(self, compiler: list[str], root: Path, target: Path) -> None:
        """Leave a library of these sources, or none."""
        sources = [str(root / _FOLDER / name) for name in _SOURCES]
        record = root / _RECORD
        made_of = _made_of([*compiler, *_FLAGS], sources)
        if target.exists() and record.exists() and record.read_text().split() == [made_of, _digest(target)]:
            return
        record.unlink(missing_ok=True)
        # Other builds may run at the same time.
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        # Products in plain C are slow, but still better than none where a compiler or assembler is too old for others.
        for plain in ([], ["-DCT_PLAIN"]):
            try:
                command = [*compiler, *_FLAGS, *plain, *sources, "-o", str(temporary), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True)
                break
            except (OSError, subprocess.CalledProcessError) as error:
                detail = getattr(error, "stderr", "") or error
                self.app.display_warning(f"ciphertune: native loops did not compile as they should: {detail}")
        else:
            temporary.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
            return
        if not plain:
            record.parent.mkdir(exist_ok=True)
            record.write_text(f"{made_of} {_digest(temporary)}\n")
        temporary.replace(target)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _made_of(command: list[str], sources: list[str]) -> str:
    """A hash of the compiler, its options and the sources."""
    there = shutil.which(command[0])
    version = subprocess.run([there, "--version"], capture_output=True, check=False).stdout if there else b""
    digests = [_digest(Path(source)) for source in sources]
    parts = [sysconfig.get_platform(), repr(command), version.hex(), *digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
