"""The deployment files: valid YAML, with commands and options that exist, and what they mount is what they use."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ciphertune.cli import cli

DEPLOY = Path(__file__).parent.parent / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICE, SET = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
UNIT = (DEPLOY / "ciphertune-worker.service").read_text()


def parsed(arguments: list[str], existing: dict[str, Path]) -> tuple[str, dict[str, Any]]:
    """A command's name and parameters, as its own parser reads them; paths of the deployment replaced by real ones."""
    name, *rest = (str(existing.get(argument, argument)) for argument in arguments)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    with command.make_context(name, rest) as context:
        return name, context.params


@pytest.fixture
def existing(tmp_path: Path) -> dict[str, Path]:
    return dict.fromkeys(("/bundle/worker", "/srv/ciphertune/worker", "/private/train.toml"), tmp_path)


def container() -> dict[str, Any]:
    only: dict[str, Any] = SET["spec"]["template"]["spec"]["containers"][0]
    return only


WORKERS = {
    "compose a": COMPOSE["services"]["worker-a"]["command"],
    "compose b": COMPOSE["services"]["worker-b"]["command"],
    "kubernetes": container()["args"],
    "systemd": shlex.split(re.findall(r"^ExecStart=\S+ (.*)$", UNIT, re.M)[0]),
}


@pytest.mark.parametrize("name", WORKERS)
def test_workers_are_started_with_options_that_exist(name: str, existing: dict[str, Path]) -> None:
    command, parameters = parsed(WORKERS[name], existing)
    assert command == "worker"
    assert parameters["address"] == "tcp://0.0.0.0:5555"
    assert parameters["curve"]
    assert parameters["metrics_port"] == 9100
    assert not parameters["insecure"]
    assert not parameters["no_authentication"]


def test_workers_get_time_to_drain() -> None:
    _, parameters = parsed(WORKERS["systemd"], {"/srv/ciphertune/worker": DEPLOY})
    drain = parameters["drain"]
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[0]) > drain
    assert int(COMPOSE["services"]["worker-a"]["stop_grace_period"].removesuffix("s")) > drain
    assert SET["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain


def test_compose_gives_each_side_its_own_keys_only() -> None:
    mounted = {name: " ".join(service["volumes"]) for name, service in COMPOSE["services"].items()}
    assert set(mounted) == {"worker-a", "worker-b", "client"}
    for name in ("worker-a", "worker-b"):
        assert "keys/worker.key" in mounted[name]
        assert "keys/clients" in mounted[name]
        assert "client.key" not in mounted[name]
        assert "bundle/client" not in mounted[name]
    assert "keys/client.key" in mounted["client"]
    assert "keys/worker.pub" in mounted["client"]
    assert "worker.key" not in mounted["client"]
    assert "bundle/worker" not in mounted["client"]


def test_kubernetes_mounts_what_the_command_names() -> None:
    spec = SET["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    for part in (container(), *spec["initContainers"]):
        assert {mount["name"] for mount in part["volumeMounts"]} <= volumes
    paths = [mount["mountPath"] for mount in container()["volumeMounts"]]
    arguments = container()["args"]
    for path in (arguments[1], arguments[arguments.index("--curve") + 1]):
        assert any(path == mount or path.startswith(mount + "/") for mount in paths)
    assert SET["spec"]["serviceName"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == SET["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["ports"][0]["port"] == container()["ports"][0]["containerPort"]


def test_the_image_is_built_from_what_the_package_needs() -> None:
    lines = (DEPLOY / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (.+) \S+$", lines, re.M))
    copied = {part for line in copied for part in line.split()}
    root = DEPLOY.parent
    assert all((root / part).exists() for part in copied)
    built = (root / "pyproject.toml").read_text()
    for source in re.findall(r"^dev-mode-dirs = \[(.+)\]$", built, re.M)[0].replace('"', "").split(", "):
        assert source in copied
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE"} <= copied
    assert re.search(r"^USER (?!root)", lines, re.M)
    assert 'ENTRYPOINT ["ciphertune"]' in lines
    extras = re.findall(r"\.\[(.+?)\]", lines)[0].split(",")
    assert all(re.search(rf"^{extra} = \[", built, re.M) for extra in extras)
