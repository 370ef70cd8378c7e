"""Build hook: compile the mlwe backend's loops where a C compiler is found; without one the portable code runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("backends/ciphertune_mlwe/native")
_SOURCES = ("kernels.c", "product.c")
# No contraction: the same integers as the portable code on every machine.
_FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"]


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
        temporary = target.with_suffix(".tmp")
        sources = [str(root / _FOLDER / name) for name in _SOURCES]
        # Products in plain C are slow, but still better than none where a compiler or assembler is too old for others.
        for plain in ([], ["-DCT_PLAIN"]):
            try:
                command = [*compiler.split(), *_FLAGS, *plain, *sources, "-o", str(temporary), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True)
                break
            except (OSError, subprocess.CalledProcessError) as error:
                detail = getattr(error, "stderr", "") or error
                self.app.display_warning(f"ciphertune: native loops did not compile as they should: {detail}")
        else:
            temporary.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
            return
        temporary.replace(target)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(str(_FOLDER / "kernels.so"))
