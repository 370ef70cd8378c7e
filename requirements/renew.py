"""Writes the constraints of an environment: the newest releases that go together today. ``make constraints`` runs it.

``python requirements/renew.py NAME REQUIREMENT …`` resolves the requirements and writes
``requirements/NAME-VERSION.txt`` for the running Python's version; nothing is installed. torch and what comes with it
is left out: the Makefile names its version, and its builds for other machines ask for other packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

_LEFT_OUT = re.compile(r"(torch|triton|nvidia-.*|cuda-.*|ciphertune.*|pip)")


def resolved(requirements: list[str]) -> list[str]:
    """``NAME==VERSION`` of everything that pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-"]
    run = subprocess.run([*command, *requirements], stdout=subprocess.PIPE, text=True, check=True)
    packages = [entry["metadata"] for entry in json.loads(run.stdout)["install"]]
    # A local version, such as one for the CPU alone, is not everywhere.
    versions = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"].partition("+")[0] for p in packages}
    return sorted(f"{name}=={version}" for name, version in versions.items() if not _LEFT_OUT.fullmatch(name))


if __name__ == "__main__":
    file = Path(__file__).parent / f"{sys.argv[1]}-{sys.version_info.major}.{sys.version_info.minor}.txt"
    lines = resolved(sys.argv[2:])
    file.write_text("\n".join([f"# Made by `make constraints`, Python {file.stem.rpartition('-')[2]}.", *lines, ""]))
