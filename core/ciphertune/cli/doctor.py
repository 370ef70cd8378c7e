"""``ciphertune doctor``: what runs here, and how fast."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from ciphertune import __version__, registry
from ciphertune.cli.output import print_facts, print_json
from ciphertune.errors import CipherTuneError

_PACKAGES = (
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


def _float_speed() -> float:
    """float32 multiply-adds a second, in billions, on a product of 1024 × 1024 × 1024."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 1024**3 / best / 1e9


def _memory() -> dict[str, float | str]:
    """Memory of the machine in GB, as far as the system says."""
    facts: dict[str, float | str] = {"memory (GB)": "unknown", "memory available (GB)": "unknown"}
    try:
        facts["memory (GB)"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        facts["memory available (GB)"] = round(kibibytes * 1024 / 1e9, 1)
    except (AttributeError, OSError, StopIteration, ValueError):
        pass
    return facts


def diagnose() -> dict[str, Any]:
    """Versions, machine and kernels, as plain data."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "ciphertune": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    machine = {
        "platform": platform.platform(),
        "processor capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **_memory(),
        "CUDA": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not available",
        "float32 product (GMAC/s)": round(_float_speed(), 1),
    }
    backends: dict[str, dict[str, Any]] = {}
    for name, row in registry.installed(registry.BACKENDS).items():
        try:
            backends[name] = dict(row.load()().diagnose(torch.device("cpu")))
        except CipherTuneError as error:
            backends[name] = {"error": str(error)}
        except Exception as error:
            # A stranger's backend may raise anything; the others are examined all the same.
            backends[name] = {"error": f"{type(error).__name__}: {error}"}
    return {"versions": versions, "machine": machine, "backends": backends}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Versions, threads, and which product kernel was chosen with its speed."""
    found = diagnose()
    if as_json:
        print_json(found)
        return
    print_facts("Versions", {name: version or "not installed" for name, version in found["versions"].items()})
    print_facts("Machine", found["machine"])
    for name, facts in found["backends"].items():
        if facts:
            print_facts(f"Backend {name}", facts)
