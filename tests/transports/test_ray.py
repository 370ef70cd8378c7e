"""The transport's suite; deployments on a cluster of two nodes: placed, killed, grown, and gone with their client."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster as clusters
import pytest
import torch
import warm
from torch import nn

import ciphertune
from ciphertune.errors import ConfigError, SelectionError, TransportError
from ciphertune.plugins import registry
from ciphertune.testing import TransportSuite
from ciphertune_ray.transport import RayTransport

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(1200)]

ray: Any = pytest.importorskip("ray", reason="the ray transport needs Ray")
deployment: Any = pytest.importorskip("ciphertune_ray.deployment")
relay: Any = pytest.importorskip("ciphertune_ray.relay")
scaling: Any = pytest.importorskip("ciphertune_ray.scaling")

SECONDS = 300.0
CLIENT_PORT = clusters.free_port()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; this process starts and ends deployments there, as the commands do."""
    with clusters.cluster(nodes=2, client_port=CLIENT_PORT) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        relay.join("auto")
        yield made
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
class TestRay(TransportSuite):
    """A worker started by hand, behind an actor."""

    name = "ray"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    ciphertune.split(network(), folder, layers="all")
    return folder


@pytest.fixture
def deployed(cluster: Any, bundle: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Starts a deployment or makes it larger; what its workers say of themselves."""
    names = set()

    def up(name: str, workers: int = 1, **wanted: Any) -> list[dict[str, Any]]:
        names.add(name)
        spec = deployment.plan(deployment.Wanted(str(bundle), workers, **{"cpus": 0.5, **wanted}))
        deployment.grow(name, spec, workers, shared=True, seconds=SECONDS)
        return deployment.describe(name)

    yield up
    for name in names:
        deployment.shrink(name, 0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))


_COMMAND = "import sys; from ciphertune.cli import main; main(sys.argv[1:])"


def command(*arguments: str, status: int = 0) -> Any:
    """A ``ciphertune ray`` command; its JSON, or what it complains of."""
    done = warm.run(_COMMAND, "ray", *arguments, "--json", seconds=600)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


class Training:
    """Steps of a network, each a forward and a backward pass, and what a test does between the two."""

    def __init__(self, to: str) -> None:
        self.model = ciphertune.outsource(network(), to, "all")
        self.session = ciphertune.session_of(self.model)
        torch.manual_seed(1)
        self.head = nn.Parameter(torch.randn(3))
        self.inputs = nn.Parameter(torch.randn(8, 12))
        self.optimizer = torch.optim.SGD([self.head, self.inputs], lr=0.1)

    def step(self, meanwhile: Callable[[], object] = lambda: None) -> float:
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs) * self.head).square().mean()
        meanwhile()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def workers(self) -> list[str]:
        return [worker.link.name for worker in self.session.pool.workers]


@pytest.fixture
def training() -> Iterator[Callable[[str], Training]]:
    made: list[Training] = []

    def train(where: str, **options: Any) -> Training:
        query = "".join(f"&{name}={value}" for name, value in options.items())
        made.append(Training(f"clear+ray://{where}?allow_insecure=1&weight_bits=8{query}"))
        return made[-1]

    yield train
    for each in made:
        each.session.close()


@pytest.fixture(scope="module")
def expected() -> list[float]:
    local = Training("clear?weight_bits=8")
    return [local.step() for _ in range(8)]


def test_workers_are_spread_over_nodes_and_train_as_in_this_process(
    deployed: Any, training: Any, expected: list[float]
) -> None:
    first, second = deployed("spread", 2, placement="layers:2")
    assert first["node"] != second["node"]
    assert {first["layers"], second["layers"]} == {1, 2}
    assert first["weight_bytes"] + second["weight_bytes"] == 12 * 128 + 128 * 32 + 32 * 3
    run = training("auto/spread")
    assert [run.step() for _ in range(3)] == expected[:3]


def test_actors_and_relays_that_are_killed_are_started_again(
    deployed: Any, training: Any, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSPITAL_TOKEN", "secret-of-this-process")
    (worker,) = deployed("killed")
    run = training("auto/killed", max_inflight_mb=64)
    link: Any = run.session.pool.workers[0].link
    if sys.platform == "linux":
        assert b"HOSPITAL" not in Path(f"/proc/{link.relay.pid}/environ").read_bytes()
    losses = [run.step(), run.step(lambda: os.kill(link.relay.pid, signal.SIGKILL))]
    losses += [run.step(lambda: os.kill(worker["pid"], signal.SIGKILL)), run.step()]
    assert losses == expected[:4]
    assert run.session.traffic.retries >= 2
    (again,) = deployment.describe("killed")
    assert again["pid"] != worker["pid"]


def test_a_node_that_is_gone_in_the_middle_of_a_step(
    cluster: Any, deployed: Any, training: Any, expected: list[float]
) -> None:
    """Each of its workers has a replica on another node, and is started again there by and by."""
    node = cluster.add_node(num_cpus=4, memory=clusters.MEMORY, object_store_memory=128 << 20)
    workers = deployed("nodes", 3)
    assert len({worker["node"] for worker in workers} | {node.node_id}) == 3
    run = training("auto/nodes")
    losses = [run.step(), run.step(lambda: cluster.remove_node(node, allow_graceful=False)), run.step(), run.step()]
    assert losses == expected[:4]

    def up() -> bool:
        found = deployment.describe("nodes")
        return all(worker["state"] == "up" and worker["node"] != node.node_id for worker in found) and len(found) == 3

    until(up)
    assert run.step() == expected[4]


def test_actors_and_a_node_that_are_killed_while_eight_clients_train(
    cluster: Any, deployed: Any, training: Any, expected: list[float]
) -> None:
    node = cluster.add_node(num_cpus=4, memory=clusters.MEMORY, object_store_memory=128 << 20)
    workers = deployed("eight", 3)
    runs = [training("auto/eight") for _ in range(8)]
    # All of them are within a step while something is killed.
    within, killed = (threading.Barrier(len(runs) + 1, timeout=SECONDS) for _ in range(2))
    losses: dict[int, list[float]] = {}

    def hold() -> None:
        within.wait()
        killed.wait()

    def train(number: int) -> None:
        run = runs[number]
        losses[number] = [run.step(hold) if step in (1, 3) else run.step() for step in range(6)]

    threads = [threading.Thread(target=train, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    away = [worker for worker in workers if worker["node"] == node.node_id]
    for kill in (
        lambda: os.kill(next(worker["pid"] for worker in workers if worker not in away), signal.SIGKILL),
        lambda: cluster.remove_node(node, allow_graceful=False),
    ):
        within.wait()
        kill()
        killed.wait()
    for thread in threads:
        thread.join(SECONDS)
    assert losses == dict.fromkeys(range(len(runs)), expected[:6])
    assert sum(run.session.traffic.retries for run in runs) > 0


def test_workers_are_added_and_ended_by_the_requests_that_wait(deployed: Any, training: Any) -> None:
    deployed("scaled")
    known = deployment.spec_of("scaled")
    rounds: list[list[int]] = []
    loads = [9, 9, 0, 0, 0]

    def looked() -> bool:
        rounds.append(deployment.members("scaled"))
        return len(rounds) > len(loads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            deployment,
            "describe",
            lambda name: [{"queued": loads[len(rounds) - 1], "under_way": 0}] * len(deployment.members(name)),
        )
        patch.setattr(deployment, "spec_of", lambda name: known)
        rule = scaling.Scale(1, 2, busy_seconds=0.0, idle_seconds=0.0)
        deployment.keep_scaled("scaled", rule, 0.01, SECONDS, looked)
    assert rounds == [[0], [0, 1], [0, 1], [0], [0], [0]]
    with pytest.raises(TransportError, match="no deployment named 'nothing'"):
        deployment.keep_scaled("nothing", rule, 0.01, SECONDS, looked)


def test_growth_between_steps(
    deployed: Any, training: Any, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayTransport, "joining_seconds", 0.2)
    (first,) = deployed("grown")
    run = training("auto/grown")
    losses = [run.step()]
    assert run.workers() == ["auto/grown/0"]
    deployed("grown", 3)
    until(lambda: len(run.workers()) == 3 and all(w.session for w in run.session.pool.workers))
    # The others do the work where the first is gone.
    losses += [run.step(lambda: os.kill(first["pid"], signal.SIGKILL)), run.step()]
    assert deployment.shrink("grown", 2) == [2]
    losses.append(run.step())
    assert losses == expected[:4]


def test_a_client_asks_for_more_workers(deployed: Any, training: Any, expected: list[float]) -> None:
    deployed("more")
    run = training("auto/more", workers=2)
    assert run.workers() == ["auto/more/0", "auto/more/1"]
    assert run.step() == expected[0]
    assert deployment.members("more") == [0, 1]


def test_from_outside(
    deployed: Any, training: Any, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a head's Ray Client server; and without any Ray, from a worker that listens by itself."""
    zmq: Any = registry.load(registry.TRANSPORTS, "zmq")
    zmq.make_keys(tmp_path / "keys", ["client"], worker=True)
    port = clusters.free_port()
    options = {"curve": str(tmp_path / "keys")}
    (worker,) = deployed("outside", listen="zmq", port=port, listen_options=options)
    assert worker["address"].endswith(f":{port}")
    run = training(f"127.0.0.1:{CLIENT_PORT}/outside", connect_timeout=300)
    assert [run.step(), run.step()] == expected[:2]
    to = f"clear+zmq://127.0.0.1:{port}?allow_insecure=1&weight_bits=8&curve={tmp_path / 'keys'}"
    direct = Training(to)
    assert [direct.step(), direct.step()] == expected[:2]
    direct.session.close()


def test_a_client_from_outside_follows_a_worker_that_starts_again_elsewhere(
    deployed: Any, expected: list[float], tmp_path: Path
) -> None:
    zmq: Any = registry.load(registry.TRANSPORTS, "zmq")
    zmq.make_keys(tmp_path / "keys", ["client"], worker=True)
    file = tmp_path / "addresses/0.address"
    options = {"curve": str(tmp_path / "keys")}
    (worker,) = deployed("moving", listen="zmq", port=0, listen_options=options, addresses=str(file.parent))
    assert file.read_text() == f"{worker['address']}\n"
    query = f"allow_insecure=1&weight_bits=8&curve={tmp_path / 'keys'}"
    run = Training(f"clear+zmq://file://{file}?{query}")
    with socket.socket() as taken:  # once the worker is dead, so that it has to take another port
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def dies() -> None:
            os.kill(worker["pid"], signal.SIGKILL)
            until(lambda: not binds(taken, int(worker["address"].rpartition(":")[2])))

        assert [run.step(), run.step(dies), run.step()] == expected[:3]
    assert file.read_text() != f"{worker['address']}\n"
    run.session.close()


def binds(taker: socket.socket, port: int) -> bool:
    """Whether somebody listens at a port; if not, ``taker`` has it from now on."""
    try:
        taker.bind(("0.0.0.0", port))
        taker.listen()
    except OSError:
        return True
    return False


CLIENT = """
import sys, time, torch
from torch import nn
import ciphertune

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))
model = ciphertune.outsource(model, sys.argv[1], "all")
model(torch.randn(4, 12))
name = ciphertune.session_of(model).pool.workers[0].link.name.split("/")[1]
print(name, [module for module in sys.modules if module.partition(".")[0] == "ray"], flush=True)
time.sleep(600)
"""


def test_a_client_that_is_killed_takes_its_own_workers_along_and_disturbs_nobody(
    bundle: Path, deployed: Any, training: Any, expected: list[float]
) -> None:
    deployed("shared")
    run = training("auto/shared")
    losses = [run.step()]
    clients = [
        warm.start([to], code=CLIENT) for to in ("mlwe+ray://auto/shared", f"mlwe+ray://auto?bundle={bundle}&cpus=0.5")
    ]
    try:
        said = [client.stdout.readline().split(maxsplit=1) for client in clients if client.stdout is not None]
        assert said[0][0] == "shared"
        assert said[1][0] in deployment.deployments()
        # What a cluster sends is unpickled in the relay, never where keys and data are.
        assert [modules.strip() for _, modules in said] == ["[]", "[]"]
        losses.append(run.step(lambda: [client.kill() for client in clients]))
    finally:
        for client in clients:
            client.kill()
            client.wait(60)
            assert client.stdout is not None
            client.stdout.close()
    losses.append(run.step())
    assert losses == expected[:3]
    until(lambda: deployment.deployments() == ["shared"])


def test_own_workers_end_with_the_session(bundle: Path, training: Any, expected: list[float]) -> None:
    run = training("auto", bundle=bundle, workers=2, placement="rows", cpus=0.5)
    assert [run.step() for _ in range(2)] == expected[:2]
    assert len(deployment.deployments()) == 1
    run.session.close()
    until(lambda: deployment.deployments() == [])


def test_what_a_cluster_has_no_room_for(cluster: Any, bundle: Path, training: Any) -> None:
    with pytest.raises(TransportError, match=r"no room for 9 workers of 1 CPU, .*free: "):
        training("auto", bundle=bundle, workers=9, start_timeout=2)
    with pytest.raises(ConfigError, match=r"needs 0\.54 GB, and 0\.01 GB are what it may have"):
        training("auto", bundle=bundle, memory_gb=0.01)
    with pytest.raises(ConfigError, match="3 blocks cannot be 4 parts"):
        deployment.plan(deployment.Wanted(str(bundle), 4, "layers"))
    with pytest.raises(ConfigError, match="1 workers cannot hold the 3 parts"):
        deployment.grow("few", deployment.plan(deployment.Wanted(str(bundle), 3, "layers")), 1, shared=True, seconds=1)
    assert deployment.deployments() == []


def test_names_that_are_none(cluster: Any, tmp_path: Path, training: Any) -> None:
    with pytest.raises(TransportError, match=r"no deployment named 'absent'.*ciphertune ray up"):
        training("auto/absent")
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        training("auto", bundle=tmp_path)
    for to in (
        "auto?placement=rows",
        "auto/name?bundle=b",
        "auto/a b",
        "nowhere",
        "head:99999",
        "auto/a/b",
        "?workers=2",
    ):
        with pytest.raises(SelectionError):
            Training(f"mlwe+ray://{to}")


def test_the_commands(cluster: Any, bundle: Path) -> None:
    (worker,) = command("up", str(bundle), "--name", "told", "--cpus", "0.5", "--max-requests", "8")["told"]
    assert (worker["state"], worker["layers"], worker["spec"]["max_requests"]) == ("up", 3, 8)
    assert [row["pid"] for row in command("status")["told"]] == [worker["pid"]]
    other = command("up", str(bundle), "--name", "told", "--placement", "rows", "--workers", "2", status=1)
    assert "take another --name" in other
    assert command("down", "--name", "told") == {"name": "told", "stopped": 1}
    assert "no deployment named 'told'" in command("down", "--name", "told", status=1)
    assert deployment.deployments() == []


def test_a_cluster_that_is_not_there(training: Any) -> None:
    with pytest.raises(TransportError, match="cannot be joined: .*refused"):
        training("gcs://127.0.0.1:1/absent")
    assert "cannot be joined" in command("status", "--address", "127.0.0.1:1", status=1)
