"""The command ``ciphertune doctor``: versions, kernels and their speeds."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from typing import Any

import click

from ciphertune._support import environment
from ciphertune.cli.installed import ANSWERS, REFUSED, everything
from ciphertune.cli.output import print_entries, print_facts, print_json
from ciphertune.plugins import registry


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a user may want to do, and the extra with the packages that it needs."""

    name: str
    extra: str
    modules: tuple[str, ...]


_TRAINING = ("transformers", "peft", "accelerate", "matplotlib")
_JOBS = (
    _Job("train here", "demo", _TRAINING),
    _Job("use remote workers", "demo,zmq", (*_TRAINING, "zmq")),
    _Job("serve as a worker", "worker", ("zmq", "prometheus_client")),
    _Job("use a Ray cluster", "demo,ray", (*_TRAINING, "ray", "fsspec")),
)


def verdicts() -> dict[str, str]:
    """For each job whether this environment can do it, and what to install where it cannot."""
    found = {}
    for job in _JOBS:
        missing = [name for name in job.modules if importlib.util.find_spec(name) is None]
        lacks = f'lacks {", ".join(missing)}: pip install "ciphertune[{job.extra}]"'
        found[job.name] = lacks if missing else "ready"
    return found


def _float_speed() -> float:
    """Measure float32 multiply-adds a second, in billions, on a product of 1024 × 1024 × 1024."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 1024**3 / best / 1e9


def diagnose() -> dict[str, Any]:
    """Collect versions, machine and kernels, as plain data."""
    import torch

    about, (_, available) = environment.machine(), environment.memory()
    about["memory available (GB)"] = "unknown" if available is None else available
    about["float32 product (GMAC/s)"] = round(_float_speed(), 1)
    rows = everything()
    backends: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "backend" and row["state"] != REFUSED:
            said = {"licence": row["licence"]} if row.get("licence") else {}
            if row["checked"] == "no":
                said["answers of workers elsewhere"] = ANSWERS["no"]
            if row.get("problem"):
                backends[row["name"]] = {"cannot run here": row["problem"], **said}
                continue
            try:
                found = registry.get_backend(row["name"])().diagnose(torch.device("cpu"))
                backends[row["name"]] = {**found, **said}
            except Exception as error:
                # A stranger's backend may raise anything; the others are examined all the same.
                row["reason"] = registry.reason(error)
    return {
        "verdicts": verdicts(),
        "versions": environment.versions(),
        "machine": about,
        "backends": backends,
        "plugins": [_complaint(row) for row in rows if row["reason"] or row["mismatch"]],
    }


def _complaint(row: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a plugin."""
    said = "; ".join(filter(None, (row["reason"], row["mismatch"])))
    return {"kind": row["kind"], "name": row["name"], "package": row["package"], "reason": said}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what this environment can do and what is missing, with versions, threads, and the product kernel's speed."""
    found = diagnose()
    if as_json:
        print_json(found)
        return
    slow = [fact for facts in found["backends"].values() for fact in [facts.get("encryption loops")] if fact]
    print_facts("What this environment can do", found["verdicts"])
    if any(loops != "compiled" for loops in slow):
        click.echo(
            "Encryption runs without compiled loops, several times slower: install a C compiler, then CipherTune again."
        )
    print_facts("Versions", {name: version or "not installed" for name, version in found["versions"].items()})
    print_facts("Machine", found["machine"])
    if found["plugins"]:
        click.echo("Plugins that cannot be used, or are made for another version")
        print_entries([(f"{row['kind']} {row['name']}", [row["reason"], row["package"]]) for row in found["plugins"]])
    for name, facts in found["backends"].items():
        if facts:
            print_facts(f"Backend {name}", facts)
