"""The deployment files: valid YAML, with commands and options that exist, and what they mount is what they use."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ciphertune.cli import cli

DEPLOY = Path(__file__).parents[2] / "deploy"
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
    assert re.findall(r"\.\[(.+?)\]", lines) == ["${EXTRAS}"]
    extras = {part for text in re.findall(r"EXTRAS=(\S+)", lines) for part in text.split(",")}
    assert extras == {"hf", "ray", "worker"}
    assert all(re.search(rf"^{extra} = \[", built, re.M) for extra in extras)


RAY, JOB, POLICY = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())


def test_the_ray_deployment_is_started_with_options_that_exist() -> None:
    pod = JOB["spec"]["template"]["spec"]
    first, second, *rest = pod["containers"][0]["args"]
    group: Any = cli.get_command(click.Context(cli), first)
    with group.get_command(click.Context(group), second).make_context(second, rest) as context:
        found = context.params
    workers = RAY["spec"]["workerGroupSpecs"][0]
    head = RAY["spec"]["headGroupSpec"]["template"]
    assert (first, second, found["bundle"]) == ("ray", "up", "/bundle")
    assert found["workers"] == workers["replicas"]
    assert str(int(found["cpus"])) == workers["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert (found["listen"], found["extra"]) == ("zmq", ("curve=/keys",))
    assert found["address"] == f"gcs://{RAY['metadata']['name']}-head-svc:6379"
    # Ray's ports are for the cluster's own pods, workers' own for others too.
    labels = POLICY["spec"]["podSelector"]["matchLabels"]
    templates = (head, workers["template"], JOB["spec"]["template"])
    assert all(labels.items() <= template["metadata"]["labels"].items() for template in templates)
    inside, anyone = POLICY["spec"]["ingress"]
    assert inside["from"] == [{"podSelector": {"matchLabels": labels}}]
    (ports,) = anyone["ports"]
    assert ports["port"] == found["port"]
    assert ports["endPort"] >= found["port"] + workers["maxReplicas"] - 1


def test_pods_of_the_ray_cluster_mount_what_they_name() -> None:
    for group in (RAY["spec"]["headGroupSpec"], RAY["spec"]["workerGroupSpecs"][0]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in (*pod["containers"], *pod["initContainers"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert "client.key" not in str(pod)
