"""The image's instructions without a registry or a daemon: ``python tests/long/image.py`` on Debian, as root.

``deploy/Dockerfile`` is carried out on an overlay of this machine's files that is thrown away: what it copies, what it
runs, and as whom. ``FROM`` is this system with a virtual environment of its own Python. Then a worker of the image
serves on a read-only file system, as the user of the image, without capabilities, and a client outside uses it. What
the base image brings along is not tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
BASE = "/usr/local/base"
START_SECONDS = 180.0


def instructions(text: str) -> list[tuple[str, str]]:
    """Words and rests of a Dockerfile's instructions; continued lines are joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


class Image:
    """An image that is built on an overlay of this system, in a mount namespace of this process.

    Args:
        folder: a tmpfs for what differs from this system.
        arguments: of the build, instead of their defaults.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, str]) -> None:
        self.root = folder / "root"
        for name in ("upper", "work", "root"):
            (folder / name).mkdir()
        layers = f"lowerdir=/,upperdir={folder / 'upper'},workdir={folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        for name in ("proc", "dev"):
            subprocess.run(["mount", "--rbind", f"/{name}", str(self.root / name)], check=True)
        self.variables = {"PATH": f"{BASE}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        # pip finds packages as it does outside.
        self.variables |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.workdir, self.user, self.entrypoint = "/", "root", ["/bin/sh"]
        self._arguments = dict(arguments)
        self.run(f"/usr/bin/python3 -m venv {BASE}")

    def build(self, text: str) -> None:
        for word, rest in instructions(text):
            sys.stdout.write(f"{word} {rest}\n")
            sys.stdout.flush()
            getattr(self, f"_{word.lower()}")(rest)

    def run(self, command: str, *, shell: bool = True, **options: Any) -> None:
        subprocess.run(self.words(["/bin/sh", "-c", command] if shell else shlex.split(command)), check=True, **options)

    def words(self, command: list[str]) -> list[str]:
        """A command line that runs a command in the image, as its user."""
        enter = ["chroot"] + ([] if self.user == "root" else [f"--userspec={self.user}"]) + [str(self.root)]
        here = ["/usr/bin/env", "-i", f"--chdir={self.workdir}", *(f"{k}={v}" for k, v in self.variables.items())]
        return [*enter, *here, *command]

    def _from(self, rest: str) -> None:
        """This system is the base."""

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.variables[name] = self._arguments.get(name, value.strip('"'))

    def _env(self, rest: str) -> None:
        self.variables |= dict(each.split("=", 1) for each in shlex.split(rest))

    def _workdir(self, rest: str) -> None:
        self.workdir = rest
        (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        folder = self.root / self.workdir.lstrip("/")
        for source in sources:
            to = folder / target if target != "./" else folder / source
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy2)(ROOT / source, to)

    def _run(self, rest: str) -> None:
        self.run(rest)

    def _user(self, rest: str) -> None:
        self.user = rest

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        subprocess.run(self.words([*self.entrypoint, *json.loads(rest)]), check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def started(image: Image, *arguments: str) -> Iterator[str]:
    """A worker of the image, without capabilities and on a read-only file system; its address."""
    subprocess.run(["mount", "-o", "remount,ro", str(image.root)], check=True)
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    # Changing root needs a capability, so that comes first.
    command = image.words([*bare, *image.entrypoint, *arguments])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if readable else ""
        assert line.startswith("ready "), f"the worker said {line!r}"
        yield line.split()[1]
        process.terminate()
        assert process.wait(60) == 0, "it did not end in order"
    finally:
        process.kill()
        process.wait()


def inside(arguments: dict[str, str]) -> None:
    """Build and try, in a mount namespace that ends with this process."""
    import torch
    from torch import nn

    import ciphertune

    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", name], check=True)
        try:
            image = Image(Path(name), arguments)
            image.build(DOCKERFILE.read_text())
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
            served = image.root / "srv"
            ciphertune.split(network, served / "bundle")
            subprocess.run([sys.executable, "-m", "ciphertune", "keys", str(Path(name) / "keys")], check=True)
            shutil.copytree(Path(name) / "keys", served / "keys")
            for file in (served / "keys" / "worker.key", served / "keys", served):
                shutil.chown(file, 10001, 10001)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(image.root / "tmp")], check=True)
            options = ("worker", "/srv/bundle/worker", "--bind", "tcp://127.0.0.1:*", "--curve", "/srv/keys")
            with started(image, *options) as address:
                x = torch.randn(16, 24)
                with torch.no_grad():
                    expected = network(x)
                    model = ciphertune.outsource(network, f"mlwe+zmq://{address}?curve={Path(name) / 'keys'}")
                    error = float((model(x) - expected).norm() / expected.norm())
                ciphertune.session_of(model).close()
            assert error < 0.05, error
            sys.stdout.write(f"the image's worker serves: relative error {error:.1e}\n")
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", name], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if not found.inside:
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv, "--inside"]
        sys.exit(subprocess.run(command, check=False).returncode)
    inside(dict(each.split("=", 1) for each in found.build_arg))


if __name__ == "__main__":
    main()
