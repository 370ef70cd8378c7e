"""Two wheels against each other: ``python tests/wheel/versions.py PREVIOUS.whl NEW.whl``.

A client of each serves itself at a worker of the other, under encryption, with the bundle that the previous version
split. Runs with the packages of this Python, none of which is replaced. Ends with status 1 if a product is wrong, or
the two do not understand each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_NETWORK = """
import sys
import torch
from torch import nn
import ciphertune
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
"""
_SPLIT = _NETWORK + "ciphertune.split(network, sys.argv[1])\n"
_CLIENT = (
    _NETWORK
    + """
x = torch.randn(16, 24)
with torch.no_grad():
    expected = network(x)
    model = ciphertune.outsource(network, sys.argv[1])
    error = float((model(x) - expected).norm() / expected.norm())
ciphertune.session_of(model).close()
print(f"relative error {error:.1e}")
sys.exit(0 if error < 0.05 else 1)
"""
)


def environment(folder: Path) -> dict[str, str]:
    """Of processes that use the version in a folder."""
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def python(version: Path, code: str, *arguments: str) -> None:
    """Run code with a version."""
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment(version), cwd=version, check=True)


def meet(client: Path, worker: Path, work: Path) -> None:
    """Have a client of one version use a worker of the other."""
    command = [sys.executable, "-m", "ciphertune", "worker", str(work / "bundle" / "worker")]
    command += ["--bind", "tcp://127.0.0.1:*", "--curve", str(work / "keys"), "--threads", "1"]
    with subprocess.Popen(command, env=environment(worker), cwd=worker, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("ready "):
                raise SystemExit(f"the worker of {worker.name} did not start")
            python(client, _CLIENT, f"mlwe+zmq://{line.split()[1]}?curve={work / 'keys'}")
        finally:
            process.terminate()


def main(previous: str, new: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        versions = {name: work / name for name in ("previous", "new")}
        for wheel, version in zip((previous, new), versions.values(), strict=True):
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(version), wheel]
            subprocess.run(install, check=True)
        python(versions["previous"], _SPLIT, str(work / "bundle"))
        keys = [sys.executable, "-m", "ciphertune", "keys", str(work / "keys"), "--json"]
        subprocess.run(keys, env=environment(versions["previous"]), cwd=work, check=True, stdout=subprocess.DEVNULL)
        for client, worker in (("previous", "new"), ("new", "previous"), ("new", "new")):
            sys.stdout.write(f"client {client}, worker {worker}: ")
            sys.stdout.flush()
            meet(versions[client], versions[worker], work)


if __name__ == "__main__":
    main(*sys.argv[1:])
