"""Versions of packages, and properties of the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from ciphertune._support.version import __version__

PACKAGES = (
    "torch",
    "numpy",
    "cryptography",
    "msgpack",
    "pluggy",
    "rich",
    "safetensors",
    "transformers",
    "peft",
    "accelerate",
    "gguf",
    "matplotlib",
    "scikit-learn",
)


def versions() -> dict[str, str | None]:
    """Versions of Python, CipherTune and the packages that it works with; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "ciphertune": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def memory() -> tuple[float | None, float | None]:
    """Whole and available memory of the machine in GB; None where the system does not tell."""
    try:
        whole = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None, None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return whole, None
    return whole, round(kibibytes * 1024 / 1e9, 1)


def machine() -> dict[str, str | int | float]:
    """Properties of the machine: system, processor, threads, memory and accelerator. Its name is left out."""
    import torch

    whole, _ = memory()
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "processor capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "memory (GB)": "unknown" if whole is None else whole,
        "CUDA": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not available",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
