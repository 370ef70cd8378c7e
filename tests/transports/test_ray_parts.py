"""What the ray transport is made of, without a cluster: bundles anywhere, cutting, and a relay that is not trusted."""

from __future__ import annotations

import importlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.errors import ConfigError, ProtocolError, SelectionError, TransportError
from ciphertune.testing import EchoHandler
from ciphertune.worker import WeightStore
from ciphertune_ray.bundles import blocks_of, fetch_and_load, parts_of
from ciphertune_ray.channel import Channel, socket_pair
from ciphertune_ray.scaling import Scale, Scaler
from ciphertune_ray.transport import RayTransport

fsspec: Any = pytest.importorskip("fsspec", reason="the ray transport needs fsspec")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    ciphertune.split(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), folder, layers="all")
    return folder


@pytest.fixture
def url(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The bundle in an object store."""
    monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(str(bundle), "/bundle", recursive=True)
    yield "memory://bundle"
    store.rm("/bundle", recursive=True)


def kept(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "cache").rglob("*") if file.is_file())


def codes(store: WeightStore) -> list[torch.Tensor]:
    return [store[name] for name in sorted(store)]


def test_a_bundle_in_an_object_store(url: str, bundle: Path, tmp_path: Path) -> None:
    (part,) = parts_of(url)
    assert part == "memory://bundle/worker"
    assert blocks_of(part) == [([str(n)], 256) for n in range(4)] == blocks_of(str(bundle / "worker"))
    whole = codes(load_worker(bundle / "worker"))
    assert all(map(torch.equal, codes(fetch_and_load(part, [], load_worker)), whole))
    files = kept(tmp_path)
    assert len(files) == 5
    # It is not asked for again what is here.
    store = fsspec.filesystem("memory")
    for name in store.find("/bundle/worker"):
        if not name.endswith("manifest.json"):
            store.rm_file(name)
    assert all(map(torch.equal, codes(fetch_and_load(part, [], load_worker)), whole))


def test_only_what_a_worker_serves_is_fetched(url: str, tmp_path: Path) -> None:
    store = fetch_and_load(f"{url}/worker", ["1", "3"], lambda folder: load_worker(folder, layers=["1", "3"]))
    assert sorted(store) == ["1", "3"]
    assert len(kept(tmp_path)) == 3


def test_what_was_kept_and_is_damaged_is_fetched_again(url: str, tmp_path: Path) -> None:
    fetch_and_load(f"{url}/worker", [], load_worker)
    damaged = next(file for file in (tmp_path / "cache").rglob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    fetch_and_load(f"{url}/worker", [], load_worker)
    assert damaged.read_bytes() != content


def test_what_is_damaged_at_its_origin_is_refused(url: str) -> None:
    store = fsspec.filesystem("memory")
    name = next(name for name in store.find("/bundle/worker") if name.endswith(".safetensors"))
    content = bytearray(store.cat_file(name))
    content[-1] ^= 1
    store.pipe_file(name, bytes(content))
    with pytest.raises(ConfigError, match="do not have the hash"):
        fetch_and_load(f"{url}/worker", [], load_worker)


def test_a_manifest_that_names_files_elsewhere(url: str) -> None:
    store = fsspec.filesystem("memory")
    manifest = store.cat_file("/bundle/worker/manifest.json").replace(b'"file": "', b'"file": "../')
    store.pipe_file("/bundle/worker/manifest.json", manifest)
    with pytest.raises(ConfigError, match="outside it"):
        blocks_of(f"{url}/worker")


def test_a_bundle_that_is_split_already(bundle: Path, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    ciphertune.split(model, tmp_path / "cut", layers="all", workers=2, placement="layers")
    assert parts_of(str(tmp_path / "cut")) == [str(tmp_path / "cut" / f"worker-{n}") for n in (0, 1)]
    assert parts_of(str(bundle / "worker")) == [str(bundle / "worker")]
    for wrong in (str(tmp_path), "memory://absent", "no-such-scheme://bucket"):
        with pytest.raises(ConfigError):
            parts_of(wrong)


@pytest.mark.parametrize("count", range(1, 8))
def test_shards_hold_each_block_once_and_none_is_empty(count: int) -> None:
    deployment: Any = pytest.importorskip("ciphertune_ray.deployment")
    blocks = [([str(n)], size) for n, size in enumerate((100, 1, 1, 1, 1, 50, 46))]
    cut = deployment._cut(blocks, count)
    assert [block for run in cut for block in run] == blocks
    assert len(cut) == count
    assert all(cut)


def test_a_ray_of_one_process_serves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SelectionError, match="RAY_ADDRESS"):
        RayTransport.loopback(tmp_path, {})
    with pytest.raises(SelectionError, match="lets no client in"):
        RayTransport.listen(EchoHandler(), "local/name/0", {})


REFUSED = ConnectionAbortedError(
    "Initialization failure from server:\nTraceback (most recent call last):\n"
    "RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs.\n"
)


class Joining:
    """A ``ray.init`` that fails as told, and a clock that waiting moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: Exception, seconds: float = 0.0) -> None:
        ray: Any = pytest.importorskip("ray", reason="the ray transport needs Ray")
        relay: Any = importlib.import_module("ciphertune_ray.relay")
        self.now, self.waits, self.tries = 0.0, list[float](), list[Any]()
        self._failures, self._seconds = list(failures), seconds
        monkeypatch.setattr(relay, "time", self)
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(relay.socket, "create_connection", lambda *_: socket.socket())
        self.join, self.one_line = relay.join, relay.one_line

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def init(self, **options: Any) -> None:
        self.tries.append(options["address"])
        self.now += self._seconds
        if self._failures:
            raise self._failures.pop(0)


def test_a_client_server_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining(monkeypatch, REFUSED, REFUSED)
    joining.join("ray://head:10001")
    assert joining.tries == ["ray://head:10001"] * 3
    assert joining.waits == [1.0, 2.0]


def test_a_client_server_that_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining(monkeypatch, *[REFUSED] * 9)
    with pytest.raises(TransportError, match=r"ray://head:10001 started no process .*tried 4×.*23000\.err") as raised:
        joining.join("ray://head:10001")
    assert joining.waits == [1.0, 2.0, 4.0]
    # All of it is told, unlike Ray's own messages, of which the first line is.
    assert joining.one_line(raised.value) == str(raised.value)


def test_a_client_server_that_is_slow_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining ends before the process that waits for it gives up."""
    client: Any = importlib.import_module("ciphertune_ray.relay_client")
    joining = Joining(monkeypatch, *[REFUSED] * 9, seconds=30.0)
    with pytest.raises(TransportError, match="tried 2×"):
        joining.join("ray://head:10001")
    assert joining.now < client._JOIN_SECONDS


def test_other_failures_to_join_are_final(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining(monkeypatch, RuntimeError("Version mismatch"))
    with pytest.raises(RuntimeError, match="Version mismatch"):
        joining.join("ray://head:10001")
    assert joining.waits == []


def test_messages_of_a_pipe() -> None:
    here, there = map(Channel, socket_pair())
    large = bytes(range(256)) * 40000
    sending = threading.Thread(target=here.send, args=({"op": "x", "n": 1}, [b"", b"ab", memoryview(large)]))
    sending.start()
    message = there.receive()
    sending.join()
    assert message is not None
    assert message[0] == {"op": "x", "n": 1}
    assert [bytes(frame) for frame in message[1]] == [b"", b"ab", large]
    here.close()
    assert there.receive() is None
    there.close()


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        *(
            struct.pack("<I", len(head)) + head
            for head in map(
                msgpack.packb,
                (
                    {"op": "x"},
                    {"sizes": [-1]},
                    {"sizes": ["1"]},
                    {"sizes": [1 << 40]},
                    {"sizes": [1 << 30] * 6},
                    {"sizes": [0] * 100},
                    [1, 2],
                ),
            )
        ),
    ],
)
def test_a_relay_that_says_what_it_may_not(sent: bytes) -> None:
    """Sizes are looked at before memory is taken for them."""
    near, far = socket.socketpair()
    far.sendall(sent)
    channel = Channel(near)
    with pytest.raises(ProtocolError):
        channel.receive()
    channel.close()
    far.close()


@pytest.mark.parametrize("cut", [2, 4, 8, 30])
def test_a_relay_that_ends_in_the_middle(cut: int) -> None:
    near, far = socket.socketpair()
    head = msgpack.packb({"op": "x", "sizes": [100]})
    far.sendall((struct.pack("<I", len(head)) + head + bytes(100))[:cut])
    far.close()
    channel = Channel(near)
    assert channel.receive() is None
    channel.close()


def load(queued: int, under_way: int = 0, count: int = 1) -> list[dict[str, int]]:
    return [{"queued": queued, "under_way": under_way}] * count


def test_workers_are_added_once_too_many_requests_wait_for_long_and_end_once_none_do() -> None:
    scaler = Scaler(Scale(2, 6, queue=2, busy_seconds=10, idle_seconds=100, step=2))
    assert scaler.wanted(load(9, count=1), 0) == 2, "fewer than at least"
    assert [scaler.wanted(load(9, count=2), now) for now in (0, 9, 10)] == [2, 2, 4]
    assert scaler.wanted(load(2, 5, count=4), 15) == 4, "a short while of fewer begins anew"
    assert [scaler.wanted(load(9, count=4), now) for now in (16, 25, 26)] == [4, 4, 6]
    assert [scaler.wanted(load(9, count=6), now) for now in (30, 60)] == [6, 6]
    starting: list[dict[str, Any]] = [*load(9, count=4), {"state": "starting"}, {"state": "starting"}]
    assert [scaler.wanted(starting, now) for now in (70, 90)] == [6, 6], "two are about to help"
    assert [scaler.wanted(load(0, 0, count=6), now) for now in (100, 199, 200)] == [6, 6, 4]
    assert [scaler.wanted(load(0, 1, count=4), now) for now in (210, 310)] == [4, 4], "none to spare"
    assert [scaler.wanted(load(0, 0, count=2), now) for now in (400, 900)] == [2, 2]
    assert scaler.wanted([], 1000) == 2


def test_scales_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="3 workers at most are fewer than 4"):
        Scale(4, 3)
    with pytest.raises(ConfigError, match="2 workers cannot hold the 3 parts"):
        Scale(2, 3, step=3)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--addresses", "folder"], "--addresses are of workers that --listen TRANSPORT"),
        (["--listen", "zmq", "--port", "0"], "name a folder with --addresses"),
    ],
)
def test_addresses_of_workers_are_written_where_clients_can_use_them(words: list[str], why: str) -> None:
    from ciphertune_ray.commands import ray as group

    result = CliRunner().invoke(group, ["up", "bundle", *words])
    assert isinstance(result.exception, SelectionError)
    assert why in str(result.exception)


def test_an_address_appears_whole_or_the_worker_says_why_not(tmp_path: Path) -> None:
    from ciphertune_ray.actors import write_address

    write_address(tmp_path / "new/0.address", "10.0.0.5:5555")
    write_address(tmp_path / "new/0.address", "10.0.0.6:5555")
    assert [(each.name, each.read_text()) for each in (tmp_path / "new").iterdir()] == [
        ("0.address", "10.0.0.6:5555\n")
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="address cannot be written to"):
        write_address(tmp_path / "file/0.address", "10.0.0.5:5555")
