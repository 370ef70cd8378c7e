"""The tools that plugins' authors are given: a worker in a thread, a faulty link, a bundle, a simulation."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ciphertune
import ciphertune.testing
from ciphertune.errors import ReplyError, SelectionError, TransportTimeoutError
from ciphertune.testing import Faults, ServedWorker


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.linspace(-1, 1, 30).reshape(5, 6)


def expected() -> torch.Tensor:
    model = ciphertune.outsource(network(), "clear?weight_bits=8", "all")
    y: torch.Tensor = model(X).detach()
    ciphertune.session_of(model).close()
    return y


def over(faults: Faults, **options: Any) -> Any:
    query = "&".join(f"{name}={value}" for name, value in {"weight_bits": 8, **options}.items())
    return ciphertune.outsource(network(), f"clear+{faults.over()}://?{query}", "all")


def test_what_is_exported() -> None:
    suites = ["BackendSuite", "PluginSuite", "TransportSuite", "WrappingSuite"]
    names = sorted([*suites, "EchoHandler", "Faults", "LyingWorker", "ServedWorker"])
    assert ciphertune.testing.__all__ == names
    assert set(names) <= set(dir(ciphertune.testing))
    assert all(getattr(ciphertune.testing, name).__doc__ for name in names)
    with pytest.raises(AttributeError, match="no attribute 'Suite'"):
        ciphertune.testing.Suite  # noqa: B018


def test_the_fixtures_load_without_torch() -> None:
    """A pytest run that asks for the plugin and uses none of it does not wait for torch."""
    code = "import ciphertune.testing.fixtures, sys; print(sorted({'torch', 'zmq', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("options", ["", "insecure=1"])
def test_a_worker_that_goes_and_comes_back(ciphertune_worker: Callable[..., ServedWorker], options: str) -> None:
    served = ciphertune_worker(network(), options=options)
    address = served.address
    model = ciphertune.outsource(network(), served.selection("clear", allow_insecure=1, weight_bits=8), "all")
    assert torch.equal(model(X).detach(), expected())
    assert served.service.load.sessions == 1
    served.stop()
    served.stop()
    threading.Timer(0.2, served.start).start()
    assert torch.equal(model(X).detach(), expected())
    assert ciphertune.session_of(model).traffic.retries > 0
    assert (served.address, served.service.load.sessions) == (address, 1)
    ciphertune.session_of(model).close()


def test_a_worker_of_a_bundle(ciphertune_bundle: Path, ciphertune_worker: Callable[..., ServedWorker]) -> None:
    served = ciphertune_worker(ciphertune_bundle / "worker")
    model: Any = ciphertune.load_client(ciphertune_bundle / "client", served.selection("mlwe"))
    ids = torch.arange(12).reshape(1, 12)
    (logits,) = model(input_ids=ids, return_dict=False)[:1]
    assert logits.shape == (1, 12, 48)
    assert ciphertune.session_of(model).traffic.requests == 8
    ciphertune.session_of(model).close()


def test_transports_that_cannot_serve(ciphertune_worker: Callable[..., ServedWorker]) -> None:
    with pytest.raises(SelectionError, match="local transport cannot serve"):
        ciphertune_worker(network(), "local")


def test_requests_that_get_lost(ciphertune_faults: Faults) -> None:
    model = over(ciphertune_faults, timeout=0.2)
    ciphertune_faults.drop(2)
    assert torch.equal(model(X).detach(), expected())
    assert ciphertune_faults.done == {"drop": 2}
    assert ciphertune.session_of(model).traffic.retries == 2
    ciphertune_faults.drop(1000)
    session = ciphertune.session_of(model)
    session.close()
    late = over(ciphertune_faults, timeout=0.1, deadline=0.5)
    with pytest.raises(TransportTimeoutError, match="no answer within"):
        late(X)
    ciphertune_faults.heal()
    assert torch.equal(late(X).detach(), expected())
    ciphertune.session_of(late).close()


def test_replies_that_are_late(ciphertune_faults: Faults) -> None:
    model = over(ciphertune_faults)
    ciphertune_faults.delay(0.3)
    begun = time.monotonic()
    assert torch.equal(model(X).detach(), expected())
    assert time.monotonic() - begun >= 0.3
    assert ciphertune.session_of(model).traffic.retries == 0
    ciphertune.session_of(model).close()


def test_requests_that_come_twice(ciphertune_faults: Faults) -> None:
    model = over(ciphertune_faults)
    ciphertune_faults.duplicate(2)
    assert torch.equal(model(X).detach(), expected())
    assert ciphertune_faults.sent["evaluate"] == 4
    assert ciphertune_faults.done == {"duplicate": 2}
    ciphertune.session_of(model).close()


def test_replies_that_come_damaged(ciphertune_faults: Faults) -> None:
    model = over(ciphertune_faults)
    ciphertune_faults.corrupt()
    with pytest.raises(ReplyError, match="malformed"):
        model(X)
    ciphertune_faults.corrupt(where="buffers")
    assert not torch.equal(model(X).detach(), expected())
    assert torch.equal(model(X).detach(), expected())
    ciphertune.session_of(model).close()


def test_replies_in_reverse(ciphertune_faults: Faults) -> None:
    """Two threads: the one that asked first has its answer last."""
    model = over(ciphertune_faults)
    ciphertune_faults.reorder(2)
    order: list[str] = []
    wanted = expected()

    def ask(name: str) -> None:
        y = model[0](X).detach()
        order.append(name)
        assert torch.equal(model[2](y.tanh()).detach(), wanted)

    first = threading.Thread(target=ask, args=("first",))
    first.start()
    while not ciphertune_faults.done["reorder"]:
        time.sleep(0.01)
    assert order == []
    ask("second")
    first.join(60)
    assert sorted(order) == ["first", "second"]
    assert not first.is_alive()
    ciphertune.session_of(model).close()


def test_kept_replies_can_be_let_go(ciphertune_faults: Faults) -> None:
    model = over(ciphertune_faults)
    ciphertune_faults.reorder(5)
    threading.Timer(0.2, ciphertune_faults.release).start()
    assert model[0](X).shape == (5, 8)
    ciphertune_faults.heal()
    ciphertune.session_of(model).close()


def test_a_connection_that_is_lost(ciphertune_faults: Faults, ciphertune_worker: Callable[..., ServedWorker]) -> None:
    served = ciphertune_worker(network())
    to = served.selection("clear", allow_insecure=1, weight_bits=8).replace("+zmq", f"+{ciphertune_faults.over('zmq')}")
    model = ciphertune.outsource(network(), to, "all")
    ciphertune_faults.cut()
    threading.Timer(0.2, ciphertune_faults.heal).start()
    assert torch.equal(model(X).detach(), expected())
    assert ciphertune.session_of(model).traffic.retries > 0
    ciphertune.session_of(model).close()


def test_a_simulated_model(ciphertune_simulated: Callable[..., Any]) -> None:
    plain = network()
    y = plain(X).detach()
    one, two = (ciphertune_simulated(network(), "all", seed=3) for _ in range(2))
    assert torch.equal(one(X), two(X))
    assert 0 < float((one(X).detach() - y).abs().max()) < 0.1
    assert ciphertune.session_of(one).choice.selection.backend == "simulation"
