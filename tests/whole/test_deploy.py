"""The deployment files: what their own tools say of them, commands and options that exist, and mounts that are used."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ciphertune.cli import cli
from ciphertune.runs.worker_config import WorkerConfig, load_worker_config

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CONFIG, SERVICE, SET, POLICY, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
UNIT = (DEPLOY / "ciphertune-worker.service").read_text()


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """A command's name and parameters, as its own parser reads them."""
    name, *rest = arguments
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    with command.make_context(name, rest) as context:
        return name, context.params


def configuration(text: str, folder: Path) -> WorkerConfig:
    file = folder / "worker.toml"
    file.write_text(text)
    return load_worker_config(file)


def container() -> dict[str, Any]:
    only: dict[str, Any] = SET["spec"]["template"]["spec"]["containers"][0]
    return only


WORKERS = {
    "compose a": COMPOSE["services"]["worker-a"]["command"],
    "compose b": COMPOSE["services"]["worker-b"]["command"],
    "kubernetes": container()["args"],
    "systemd": shlex.split(re.findall(r"^ExecStart=\S+ (.*)$", UNIT, re.M)[0]),
}


FILES = {"systemd and compose": (DEPLOY / "worker.toml").read_text(), "kubernetes": CONFIG["data"]["worker.toml"]}


@pytest.mark.parametrize("name", WORKERS)
def test_workers_are_started_with_options_that_exist(name: str) -> None:
    command, parameters = parsed(WORKERS[name])
    assert command == "worker"
    assert parameters["config_file"] == Path("/etc/ciphertune/worker.toml")


@pytest.mark.parametrize("name", FILES)
def test_workers_are_configured_as_a_stranger_may_meet_them(name: str, tmp_path: Path) -> None:
    config = configuration(FILES[name], tmp_path)
    (bind,) = config.bind
    assert bind.address == "tcp://0.0.0.0:5555"
    assert bind.curve
    assert not bind.insecure
    assert not bind.no_authentication
    assert config.backends == ("mlwe",)
    assert config.audit == "/var/lib/ciphertune/sessions.sqlite"
    assert config.metrics.port == 9100
    # Beyond the pod only, where a policy says who may come.
    assert config.metrics.host == ("0.0.0.0" if name == "kubernetes" else "127.0.0.1")
    assert config.log.format == "json"


def test_workers_get_time_to_drain(tmp_path: Path) -> None:
    drain = max(configuration(text, tmp_path).drain for text in FILES.values()) + 10
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[0]) > drain
    assert int(COMPOSE["services"]["worker-a"]["stop_grace_period"].removesuffix("s")) > drain
    assert SET["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit_and_little_exposed(tmp_path: Path) -> None:
    unit = tmp_path / "ciphertune-worker.service"
    unit.write_text(UNIT.replace("/opt/ciphertune/bin/ciphertune", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0, "exposure of 2.0 at most"
    assert re.search(r"^Type=notify$", UNIT, re.M)
    assert re.search(r"^ExecReload=/bin/kill -HUP \$MAINPID$", UNIT, re.M)


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kuberay.yaml"])
def test_manifests_fit_the_schemas_of_kubernetes(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="schemas of Kubernetes are not installed")
    found = [each for each in yaml.safe_load_all((DEPLOY / name).read_text()) if each["apiVersion"] != "ray.io/v1"]
    assert found
    for document in found:
        validate.validate(document, "1.31", strict=True)


def test_probes_ask_for_what_the_worker_answers() -> None:
    for probe, path in (("livenessProbe", "/live"), ("readinessProbe", "/ready")):
        assert container()[probe]["httpGet"] == {"path": path, "port": "metrics"}
    assert "127.0.0.1:9100/ready" in COMPOSE["services"]["worker-a"]["healthcheck"]["test"][-1]
    anyone, monitoring = POLICY["spec"]["ingress"]
    assert [port["port"] for port in anyone["ports"]] == [5555]
    assert [port["port"] for port in monitoring["ports"]] == [9100]
    assert monitoring["from"]


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


def test_kubernetes_mounts_what_the_configuration_names(tmp_path: Path) -> None:
    spec = SET["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    claimed = {claim["metadata"]["name"] for claim in SET["spec"]["volumeClaimTemplates"]}
    for part in (container(), *spec["initContainers"]):
        assert {mount["name"] for mount in part["volumeMounts"]} <= volumes | claimed
        assert part["securityContext"]["readOnlyRootFilesystem"]
    paths = [mount["mountPath"] for mount in container()["volumeMounts"]]
    config = configuration(FILES["kubernetes"], tmp_path)
    assert config.bind[0].curve is not None
    assert config.audit is not None
    for path in (config.bundles[0], config.bind[0].curve, f"{config.bind[0].curve}/clients", config.audit):
        assert any(path == mount or path.startswith(mount + "/") for mount in paths)
    assert SET["spec"]["serviceName"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == SET["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["ports"][0]["port"] == container()["ports"][0]["containerPort"]


def test_compose_mounts_what_the_configuration_names(tmp_path: Path) -> None:
    config = configuration(FILES["systemd and compose"], tmp_path)
    for name in ("worker-a", "worker-b"):
        mounted = [volume.split(":")[1] for volume in COMPOSE["services"][name]["volumes"]]
        assert config.bundles[0] in mounted
        assert str(Path(str(config.audit)).parent) in mounted
        assert {"/etc/ciphertune/worker.toml", "/etc/ciphertune/keys/worker.key"} <= set(mounted)
    assert config.bind[0].curve == str(tmp_path / "keys"), "beside the file"


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


RAY, JOB, SCALE, RAY_POLICY = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())


def ray_command(pod: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """A group, its command, and the parameters that a pod gives it."""
    first, second, *rest = pod["spec"]["template"]["spec"]["containers"][0]["args"]
    group: Any = cli.get_command(click.Context(cli), first)
    with group.get_command(click.Context(group), second).make_context(second, rest) as context:
        return first, second, context.params


def test_the_ray_deployment_is_started_with_options_that_exist() -> None:
    first, second, found = ray_command(JOB)
    workers = RAY["spec"]["workerGroupSpecs"][0]
    head = RAY["spec"]["headGroupSpec"]["template"]
    assert (first, second, found["bundle"]) == ("ray", "up", "/bundle")
    assert found["workers"] == workers["replicas"]
    assert str(int(found["cpus"])) == workers["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert (found["listen"], found["extra"]) == ("zmq", ("curve=/keys",))
    assert found["address"] == f"gcs://{RAY['metadata']['name']}-head-svc:6379"
    # Ray's ports are for the cluster's own pods, workers' own for others too.
    labels = RAY_POLICY["spec"]["podSelector"]["matchLabels"]
    templates = (head, workers["template"], JOB["spec"]["template"], SCALE["spec"]["template"])
    assert all(labels.items() <= template["metadata"]["labels"].items() for template in templates)
    inside, anyone = RAY_POLICY["spec"]["ingress"]
    assert inside["from"] == [{"podSelector": {"matchLabels": labels}}]
    (ports,) = anyone["ports"]
    assert ports["port"] == found["port"]
    assert ports["endPort"] == found["port"] + workers["maxReplicas"] - 1


def test_the_ray_deployment_grows_as_far_as_its_nodes_do() -> None:
    first, second, found = ray_command(SCALE)
    _, _, started = ray_command(JOB)
    workers = RAY["spec"]["workerGroupSpecs"][0]
    assert (first, second) == ("ray", "scale")
    assert found["address"] == started["address"]
    assert found["min_workers"] == started["workers"]
    assert found["max_workers"] == workers["maxReplicas"]
    assert RAY["spec"]["enableInTreeAutoscaling"]
    assert SCALE["spec"]["selector"]["matchLabels"].items() <= SCALE["spec"]["template"]["metadata"]["labels"].items()


def test_pods_of_the_ray_cluster_mount_what_they_name() -> None:
    for group in (RAY["spec"]["headGroupSpec"], RAY["spec"]["workerGroupSpecs"][0]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in (*pod["containers"], *pod["initContainers"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert "client.key" not in str(pod)


def test_the_script_that_builds_the_image_makes_the_base_that_it_is_built_on() -> None:
    script = DEPLOY / "image.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    (base,) = re.findall(r"^FROM (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert f"docker.io/library/{base}\n" in script.read_text()
