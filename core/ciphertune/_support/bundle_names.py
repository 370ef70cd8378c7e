"""Names of the files by which the parts of a bundle are told apart."""

from __future__ import annotations

from pathlib import Path

CLIENT_MANIFEST = "ciphertune.json"
"""In the client's part."""
WORKER_MANIFEST = "manifest.json"
"""In a worker's part."""


def part_of_bundle(folder: Path) -> str | None:
    """What a folder is of a bundle: ``client``, ``worker`` or ``whole``; None where it is nothing of one."""
    if (folder / CLIENT_MANIFEST).is_file():
        return "client"
    if (folder / "client" / CLIENT_MANIFEST).is_file():
        return "whole"
    if (folder / WORKER_MANIFEST).is_file() and not (folder / "config.json").exists():
        return "worker"
    return None
