"""Distributions for tests, installed as pip would, and processes of their own that see them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import warm


def ship(folder: Path, distribution: str, entry_points: str, requires: str = "", **modules: str) -> None:
    """Install a distribution as pip would: modules, and a dist-info folder that points to them."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    needed = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needed}")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


def child(code: str, folder: Path, *, torch: bool = True, **environment: str) -> str:
    """What Python code prints in a process of its own that also sees the distributions in a folder.

    It finds torch imported already, and nothing of this project; nothing at all without ``torch``.
    """
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    code = textwrap.dedent(code)
    if torch:
        done = warm.run(code, preload=warm.TORCH, env=environment)
    else:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
