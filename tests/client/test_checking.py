"""Workers that answer wrongly: caught before anything is decrypted, replaced, and asked no more."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Farm, Host
from torch import nn

import ciphertune
from ciphertune.errors import ReplyError, WrongReplyError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.protocol import Message
from ciphertune.testing.lies import LIES, LyingWorker
from ciphertune_mlwe import MLWEBackend

pytestmark = pytest.mark.usefixtures("empty_cache")
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
WHOLE: Any = [["0"], ["2"]]
UPPER: Any = [[("0", 0, 64)], [("2", 0, None)]]
LOWER: Any = [[("0", 64, None)]]


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 9))


@pytest.fixture
def told() -> tuple[PluginManager, list[tuple[Any, ...]]]:
    found: list[tuple[Any, ...]] = []

    class Listening:
        @hookimpl
        def ciphertune_worker_excluded(self, worker: str, layers: tuple[str, ...], direction: str) -> None:
            found.append((worker, layers, direction))

    manager = PluginManager()
    manager.register(Listening())
    return manager, found


def lying(host: Host, after: int = 0) -> None:
    """One unit of one value is off, once so many answers were right."""
    seen = [0]

    def lie(request: Message) -> Message:
        reply = host.answer(request)
        seen[0] += 1
        if seen[0] > after:
            reply.buffers["y"] = reply.buffers["y"].clone()
            reply.buffers["y"][-1, 0, -1] ^= 1
        return reply

    host.on("evaluate", lie, always=True)


def check(outsourced: nn.Module) -> None:
    with torch.no_grad():
        expected = model()(X)
    x, plain = X.clone().requires_grad_(), X.clone().requires_grad_()
    found = outsourced(x)
    found.sum().backward()
    model()(plain).sum().backward()
    assert float((found.detach() - expected).norm() / expected.norm()) < 0.02
    assert x.grad is not None
    assert plain.grad is not None
    assert float((x.grad - plain.grad).norm() / plain.grad.norm()) < 0.02


def test_a_replica_takes_the_place_of_a_liar(farm: Farm, told: Any) -> None:
    manager, found = told
    one, two = farm.plant(model(), "mlwe", one=WHOLE, two=WHOLE)
    lying(one)
    lying(two, after=10**9)
    outsourced = model()
    session = farm.outsource(outsourced, "mlwe", plugins=manager)
    for _ in range(3):
        check(outsourced)
    assert found == [("one", found[0][1], found[0][2])], "told once"
    assert one.count("evaluate") == 1, "asked no more"
    assert two.count("evaluate") == 12
    assert [worker.excluded for worker in session.pool.workers] == [True, False]
    assert session.traffic.retries == 1


def test_a_worker_that_turns_liar(farm: Farm) -> None:
    one, two = farm.plant(model(), "mlwe", one=WHOLE, two=WHOLE)
    for host in (one, two):
        lying(host, after=5)
    outsourced = model()
    farm.outsource(outsourced, "mlwe")
    check(outsourced)
    check(outsourced)

    def go_on() -> None:
        for _ in range(2):
            check(outsourced)

    with pytest.raises(WrongReplyError, match=r"(one|two): .* broken or lies, and no other worker holds these rows"):
        go_on()
    with pytest.raises(WrongReplyError, match="no worker is left that answers rightly. one: it gave a wrong answer"):
        outsourced(X)


@pytest.mark.parametrize("liar", ["one", "two"])
def test_pieces_are_checked_one_by_one(farm: Farm, told: Any, liar: str) -> None:
    """The worker of the wrong piece is named, in both directions."""
    manager, found = told
    farm.plant(model(), "mlwe", one=UPPER, two=LOWER)
    outsourced = model()
    farm.outsource(outsourced, "mlwe", plugins=manager)
    check(outsourced)
    lying(farm.hosts[liar])
    with pytest.raises(WrongReplyError, match=liar):
        outsourced(X)
    assert [worker for worker, *_ in found] == [liar]


def test_cuts_of_workers_that_join_are_checked_too(register: Callable[[str, Any], None], told: Any) -> None:
    """Two that hold rows take over from one that holds all; their codes are read once more, for new vectors."""
    farm = Farm(register, elastic=True)
    manager, found = told
    farm.plant(model(), "mlwe", whole=WHOLE)
    try:
        outsourced = model()
        session = farm.outsource(outsourced, "mlwe", plugins=manager)
        check(outsourced)
        one, two = farm.plant(model(), "mlwe", one=UPPER, two=LOWER)
        end = time.monotonic() + 60
        while len(session.pool.workers) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        session.pool.workers[0].blocks = [[]]
        session.pool._place()
        check(outsourced)
        assert one.count("evaluate")
        assert two.count("evaluate")
        assert one.count("weights") + two.count("weights") == 2, "codes of the layer that is cut otherwise"
        lying(two)
        with pytest.raises(WrongReplyError, match="two"):
            outsourced(X)
        assert [worker for worker, *_ in found] == ["two"]
    finally:
        farm.close()


@pytest.mark.parametrize("lie", LIES)
def test_training_stops_with_the_last_checkpoint_intact(
    lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process it is a kernel's bug, or memory's: nobody is there to go on with."""
    made = MLWEBackend.worker

    def liar(*args: Any) -> LyingWorker:
        return LyingWorker(made(*args), lie, honest=6)

    monkeypatch.setattr(MLWEBackend, "worker", staticmethod(liar))
    adapter = nn.Linear(40, 40)
    outsourced = nn.Sequential(adapter, model())
    ciphertune.outsource(outsourced, "mlwe", layers=["1.*"])
    folder = tmp_path / "run"
    batches = [(X + n, torch.zeros(5, 9)) for n in range(4)]
    how: Any = {"loss_fn": nn.functional.mse_loss, "checkpoint_dir": folder, "require_adapter": False}
    trained = ciphertune.LoraTrainer(outsourced, checkpoint_every=1, **how)
    with pytest.raises(ReplyError, match=r"the embedded worker: .*Nothing of the answer was used"):
        trained.train(batches)
    ciphertune.session_of(outsourced).close()
    assert trained.step == 1, "six answers are a step and a half"
    monkeypatch.undo()
    honest = ciphertune.outsource(nn.Sequential(nn.Linear(40, 40), model()), "mlwe", layers=["1.*"])
    again = ciphertune.LoraTrainer(honest, checkpoint_every=1, **how)
    again.train(batches, resume=True)
    assert again.step == 4
    ciphertune.session_of(honest).close()


def test_replies_of_the_wrong_form_are_asked_elsewhere_too(farm: Farm, told: Any) -> None:
    manager, found = told
    one, _ = farm.plant(model(), "mlwe", one=WHOLE, two=WHOLE)
    one.on("evaluate", lambda request: Message("ok", {}, {"y": torch.zeros(3, 3, 5, dtype=torch.uint8)}), always=True)
    outsourced = model()
    farm.outsource(outsourced, "mlwe", plugins=manager)
    check(outsourced)
    assert [worker for worker, *_ in found] == ["one"]


def test_a_backend_that_checks_nothing_says_so(farm: Farm) -> None:
    assert MLWEBackend().checks_answers
    assert not MLWEBackend.from_text({"check": "0"}).checks_answers
    (one,) = farm.plant(model(), "mlwe", one=WHOLE)
    lying(one)
    outsourced = model()
    session = farm.outsource(outsourced, "mlwe", check=0)
    outsourced(X)
    assert not session.choice.backend.checks_answers


@pytest.mark.parametrize("stated", [float("nan"), float("inf"), float("-inf"), -1e9, 1e9, 2**63, True, "soon", None])
def test_a_worker_cannot_state_more_time_than_has_passed(farm: Farm, stated: Any) -> None:
    (one,) = farm.plant(model(), "mlwe", one=WHOLE)

    def tell(request: Message) -> Message:
        reply = one.answer(request)
        reply.fields["seconds"] = stated
        return reply

    one.on("evaluate", tell, always=True)
    outsourced = model()
    session = farm.outsource(outsourced, "mlwe")
    begun = time.monotonic()
    outsourced(X)
    assert 0 <= session.traffic.evaluate_seconds <= time.monotonic() - begun
