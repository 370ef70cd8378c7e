"""Workers and links that fail in the middle of training, with real processes.

``clear`` is deterministic, so that losses must be equal to the last bit to those of a run without a fault.
"""

from __future__ import annotations

import itertools
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import remote
import torch
import warm
from torch import nn

import ciphertune
from ciphertune import LoraTrainer, session_of
from ciphertune.errors import TransportError, TransportTimeoutError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.traffic import Exchange

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

STEPS = 4
CLEAR = "clear+zmq://{}?weight_bits=8&allow_insecure=1&insecure=1&heartbeat=0.3"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], nn.Module]) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny("llama").save_pretrained(folder / "model")  # type: ignore[operator]
    ciphertune.split(str(folder / "model"), folder / "bundle")
    return folder / "bundle"


class At:
    """A hook plugin that calls something right before the n-th product from now is sent.

    Attributes:
        countdown: products until then; set it for another call.
    """

    def __init__(self, number: int, action: Callable[[], Any]) -> None:
        self.countdown = number
        self._action = action
        self.plugins = PluginManager()
        self.plugins.register(self, "at")

    @hookimpl
    def ciphertune_before_request(self, exchange: Exchange) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            self._action()


def client(bundle: Path, to: str, plugins: PluginManager | None = None) -> Any:
    return remote.with_adapter(ciphertune.load_client(bundle / "client", to, plugins=plugins))


def train(model: Any, steps: int = STEPS, **options: Any) -> list[float]:
    trainer = LoraTrainer(model, learning_rate=1e-2, **options)
    torch.manual_seed(3)
    return list(trainer.train(remote.batches(steps)).losses)


@pytest.fixture(scope="module")
def reference(bundle: Path) -> tuple[list[float], int]:
    """Losses of a run without faults, and how many products it takes."""
    with remote.worker(bundle / "worker") as only:
        model = client(bundle, CLEAR.format(only.address))
        losses = train(model)
        session = session_of(model)
        assert session.traffic.retries == 0
        session.close()
        return losses, session.traffic.requests


def later(seconds: float, action: Callable[[], Any]) -> None:
    threading.Timer(seconds, action).start()


def test_a_replica_finishes_the_step_of_a_killed_worker(bundle: Path, reference: tuple[list[float], int]) -> None:
    with remote.worker(bundle / "worker") as first, remote.worker(bundle / "worker") as second:

        def strike() -> None:
            # Frozen, it has the request for certain when it is killed.
            first.freeze()
            later(0.2, first.kill)

        at = At(reference[1] // 2, strike)
        model = client(bundle, CLEAR.format(f"{first.address},{second.address}"), at.plugins)
        assert train(model) == reference[0]
        traffic = session_of(model).traffic
        assert traffic.retries >= 1
        assert traffic.requests == reference[1]
        session_of(model).close()


def test_the_only_worker_comes_back(bundle: Path, reference: tuple[list[float], int]) -> None:
    port = remote.free_port()
    revived: list[Any] = []

    def revive() -> None:
        first.kill()
        context = remote.worker(bundle / "worker", port=port)
        context.__enter__()
        revived.append(context)

    with remote.worker(bundle / "worker", port=port) as first:

        def strike() -> None:
            first.freeze()
            later(0.2, revive)

        at = At(reference[1] // 2, strike)
        model = client(bundle, CLEAR.format(first.address) + "&deadline=60", at.plugins)
        try:
            assert train(model) == reference[0]
            traffic = session_of(model).traffic
            assert traffic.retries >= 1
            assert traffic.requests == reference[1]
            session_of(model).close()
        finally:
            for context in revived:
                context.__exit__(None, None, None)


def test_a_worker_gone_for_good_loses_nothing_that_was_saved(
    bundle: Path, reference: tuple[list[float], int], tmp_path: Path
) -> None:
    checkpoints: dict[str, Any] = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": 1}
    with remote.worker(bundle / "worker") as only:
        at = At(reference[1] * 5 // 8, only.kill)
        model = client(bundle, CLEAR.format(only.address) + "&deadline=1.5", at.plugins)
        with pytest.raises(TransportTimeoutError) as failure:
            train(model, **checkpoints)
        assert only.address in str(failure.value)
        assert re.search(r"model\.layers\.\d\.\w+\.\w+_proj", str(failure.value))
        session_of(model).close()
    with remote.worker(bundle / "worker") as other:
        model = client(bundle, CLEAR.format(other.address))
        trainer = LoraTrainer(model, learning_rate=1e-2, **checkpoints)
        history = trainer.train(remote.batches(STEPS), resume=True)
        assert history.losses == reference[0]
        session_of(model).close()


def test_a_cut_link_is_mended(bundle: Path, reference: tuple[list[float], int]) -> None:
    with remote.worker(bundle / "worker") as only, remote.proxy(only.address) as link:
        cuts = iter(range(3))

        def strike() -> None:
            link.cut()
            if next(cuts, None) is not None:
                at.countdown = 10

        at = At(5, strike)
        model = client(bundle, CLEAR.format(link.address) + "&deadline=30", at.plugins)
        assert train(model) == reference[0]
        assert session_of(model).traffic.requests == reference[1]
        session_of(model).close()


def test_a_half_open_link_is_given_up_for_a_replica(bundle: Path, reference: tuple[list[float], int]) -> None:
    with (
        remote.worker(bundle / "worker") as first,
        remote.worker(bundle / "worker") as second,
        remote.proxy(first.address) as link,
    ):
        at = At(reference[1] // 2, link.stall)
        # Long before the timeout, the heartbeat tells that nobody is there.
        to = CLEAR.format(f"{link.address},{second.address}") + "&timeout=60&deadline=120"
        model = client(bundle, to, at.plugins)
        begun = time.monotonic()
        assert train(model) == reference[0]
        assert time.monotonic() - begun < 50
        link.flow()
        session_of(model).close()


def test_a_link_that_stalls_ends_with_an_error_at_the_deadline(bundle: Path) -> None:
    with remote.worker(bundle / "worker") as only, remote.proxy(only.address) as link:
        at = At(3, link.stall)
        model = client(bundle, CLEAR.format(link.address) + "&deadline=2&timeout=1", at.plugins)
        with pytest.raises(TransportTimeoutError, match="had no answer within 2"):
            train(model)
        link.flow()
        session_of(model).close()


def test_hedging_passes_by_messages_that_are_late(bundle: Path, reference: tuple[list[float], int]) -> None:
    with (
        remote.worker(bundle / "worker") as first,
        remote.worker(bundle / "worker") as second,
        remote.proxy(first.address) as link,
    ):
        # Past the handshake, one message in fifty comes three seconds late.
        link.delays = itertools.chain(itertools.repeat(0.0, 30), itertools.cycle([3.0, *itertools.repeat(0.0, 49)]))
        model = client(bundle, CLEAR.format(f"{link.address},{second.address}").replace("heartbeat=0.3", "hedge=0.1"))
        assert train(model) == reference[0]
        traffic = session_of(model).traffic
        assert traffic.retries >= 1
        assert traffic.requests == reference[1]
        session_of(model).close()


def test_a_frozen_worker_wakes_up_and_late_answers_harm_nothing(
    bundle: Path, reference: tuple[list[float], int]
) -> None:
    with remote.worker(bundle / "worker") as only:

        def strike() -> None:
            only.freeze()
            later(1.5, only.thaw)

        at = At(reference[1] // 3, strike)
        # No heartbeat to speak of: the timeout alone makes the client ask again, and both answers come.
        to = CLEAR.format(only.address).replace("heartbeat=0.3", "heartbeat=60") + "&timeout=0.5&deadline=30"
        model = client(bundle, to, at.plugins)
        assert train(model) == reference[0]
        assert session_of(model).traffic.retries >= 1
        session_of(model).close()


def test_a_needed_worker_that_is_not_there_at_the_start(bundle: Path) -> None:
    with pytest.raises(TransportError) as failure:
        client(bundle, CLEAR.format(f"127.0.0.1:{remote.free_port()}") + "&connect_timeout=0.5")
    assert "nothing answers there" in str(failure.value)
    # The cause, and none of the layers that it costs.
    assert "Is the worker started, and the address right?" in str(failure.value)
    assert "q_proj" not in str(failure.value)


_CLIENT = """
import sys, time
from pathlib import Path
import ciphertune
model = ciphertune.load_client(Path(sys.argv[1]), sys.argv[2])
print("open", flush=True)
time.sleep(60)
"""


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    return float(re.findall(rf"^{name} (\S+)$", text, re.M)[0])


def test_the_session_of_a_killed_client_is_freed(bundle: Path) -> None:
    metrics = remote.free_port()
    arguments = ("--insecure", "--idle", "1", "--metrics-port", str(metrics))
    with remote.worker(bundle / "worker", *arguments) as only:
        to = CLEAR.format(only.address)
        process = warm.start([str(bundle / "client"), to], warm.CLIENT, code=_CLIENT)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            assert _metric(metrics, "ciphertune_sessions") == 1
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            process.stdout.close()
        end = time.monotonic() + 60
        while _metric(metrics, "ciphertune_sessions") and time.monotonic() < end:
            time.sleep(0.2)
        assert _metric(metrics, "ciphertune_sessions") == 0
        assert _metric(metrics, "ciphertune_sessions_expired_total") == 1


def test_an_idle_session_is_opened_again_when_it_is_needed(bundle: Path) -> None:
    with remote.worker(bundle / "worker", "--insecure", "--idle", "0.2") as only:
        model = client(bundle, CLEAR.format(only.address))
        with torch.no_grad():
            before = model(**remote.batches(1)[0]).loss
            time.sleep(2.5)
            after = model(**remote.batches(1)[0]).loss
        assert torch.equal(before, after)
        assert session_of(model).traffic.retries >= 1
        session_of(model).close()


def test_a_worker_that_is_told_to_stop_finishes_first(bundle: Path, reference: tuple[list[float], int]) -> None:
    with remote.worker(bundle / "worker") as first, remote.worker(bundle / "worker") as second:
        statuses: list[int] = []
        at = At(reference[1] // 2, lambda: statuses.append(first.terminate()))
        model = client(bundle, CLEAR.format(f"{first.address},{second.address}"), at.plugins)
        assert train(model) == reference[0]
        assert statuses == [0]
        session_of(model).close()
