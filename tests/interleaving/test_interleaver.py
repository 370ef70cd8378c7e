"""Tasks that take turns: what overlaps, in which order, and what is left when one fails."""

from __future__ import annotations

import _thread
import contextvars
import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ciphertune
from ciphertune import interleave
from ciphertune.errors import TransportError, VetoError
from ciphertune.hookspecs import hookimpl
from ciphertune.interleaving.interleaver import Interleaver, wait_for_reply
from ciphertune.plugins.manager import PluginManager
from ciphertune.protocol import Message
from ciphertune.transport import Link, LocalWorker, Transport


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ciphertune-task")] == []


def waits(name: str, count: int, log: list[str]) -> Callable[[], str]:
    """A task that computes, waits, and computes again, so many times."""

    def task() -> str:
        for number in range(count):
            log.append(f"{name}{number}")
            wait_for_reply(lambda: None)
        log.append(f"{name}!")
        return name

    return task


def test_turns_go_round_and_who_ends_leaves_the_rotation() -> None:
    log: list[str] = []
    assert interleave([waits("a", 1, log), waits("b", 3, log), waits("c", 2, log)]) == ["a", "b", "c"]
    assert log == ["a0", "b0", "c0", "a!", "b1", "c1", "b2", "c!", "b!"]


def test_no_more_at_once_than_there_are_threads_and_threads_stay() -> None:
    log: list[str] = []
    with Interleaver(2) as turns:
        assert turns.run([waits(name, 2, log) for name in "abc"]) == ["a", "b", "c"]
        before = {thread.ident for thread in threading.enumerate()}
        seen: set[int | None] = set()
        turns.run([lambda: seen.add(threading.get_ident())] * 3)
        assert seen <= before
    # c begins where a ended, while b still waits.
    assert log == ["a0", "b0", "a1", "b1", "a!", "c0", "b!", "c1", "c!"]


def test_none_one_and_nested() -> None:
    assert interleave([]) == []
    here = threading.current_thread()
    assert interleave([threading.current_thread]) == [here]
    log: list[str] = []

    def outer(name: str) -> Callable[[], list[str]]:
        return lambda: interleave([waits(name + "x", 1, log), waits(name + "y", 1, log)])

    assert interleave([outer("a"), outer("b")]) == [["ax", "ay"], ["bx", "by"]]
    assert log == ["ax0", "ay0", "bx0", "by0", "ax!", "bx!", "ay!", "by!"]


def test_seconds_of_others_are_told_apart_from_the_wait() -> None:
    pause = threading.Event()
    told = {}

    def first() -> None:
        told["others"] = wait_for_reply(lambda: pause.wait(0.05))[1]

    def second() -> None:
        pause.wait(0.2)

    interleave([first, second])
    assert told["others"] >= 0.2
    assert wait_for_reply(lambda: 5) == (5, 0.0)


@pytest.mark.parametrize("when", ["computing", "waiting"])
def test_the_first_to_fail_is_raised_and_the_others_end(when: str) -> None:
    log: list[str] = []

    def fails() -> None:
        wait_for_reply(lambda: None)
        if when == "computing":
            raise ValueError("this one")
        wait_for_reply(lambda: 1 / 0)

    def cleans_up() -> None:
        try:
            for _ in range(9):
                try:
                    wait_for_reply(lambda: None)
                except Exception:
                    log.append("took it for a failed wait")
        finally:
            log.append("cleaned up")
            wait_for_reply(lambda: log.append("waited once more"))

    with Interleaver(3) as turns:
        with pytest.raises(ValueError if when == "computing" else ZeroDivisionError):
            turns.run([cleans_up, fails, cleans_up])
        assert log == ["cleaned up", "cleaned up"]
        assert turns.run([lambda: 1, lambda: 2]) == [1, 2]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("waits_for_ever", [True, False])
def test_an_interruption_stops_all(waits_for_ever: bool) -> None:
    ended: list[int] = []

    def task(number: int) -> None:
        try:
            wait_for_reply(lambda: None)
            if number == 1:
                _thread.interrupt_main()
            if waits_for_ever:
                wait_for_reply(lambda: threading.Event().wait(60))
            for _ in range(10**6):  # in which the interruption comes
                wait_for_reply(lambda: None)
        finally:
            ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        interleave([lambda: task(0), lambda: task(1), lambda: task(2)])
    assert sorted(ended) == [0, 1, 2]


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


def test_modes_of_the_caller_are_carried_over() -> None:
    def modes() -> tuple[Any, ...]:
        wait_for_reply(lambda: None)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu") if hasattr(torch, "get_autocast_dtype") else None,
            torch.empty(1).device.type,
            (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
            variable.get(),
            torch.get_num_threads(),
        )

    token = variable.set("mine")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert interleave([modes, modes]) == [modes()] * 2
        with torch.inference_mode():
            assert interleave([modes, modes]) == [modes()] * 2
        with torch.device("meta"):
            assert interleave([modes, modes]) == [modes()] * 2
        assert interleave([modes, modes]) == [modes()] * 2
        threads = torch.get_num_threads()
        with Interleaver(2) as turns:
            turns.run([modes, modes])
            torch.set_num_threads(threads + 1)
            try:
                assert turns.run([modes, modes]) == [modes()] * 2
            finally:
                torch.set_num_threads(threads)
    finally:
        variable.reset(token)


def test_each_task_has_a_random_stream_and_none_is_used_twice() -> None:
    def draws() -> list[float]:
        values = [float(torch.rand(()))]
        wait_for_reply(lambda: None)
        with torch.random.fork_rng(devices=[]):  # as gradient checkpointing does
            torch.manual_seed(5)
            wait_for_reply(lambda: None)
            assert float(torch.rand(())) == replayed
        return [*values, float(torch.rand(()))]

    torch.manual_seed(5)
    replayed = float(torch.rand(()))
    torch.manual_seed(0)
    rounds = [interleave([draws, draws, draws]) for _ in range(2)]
    torch.manual_seed(0)
    assert rounds == [interleave([draws, draws, draws]) for _ in range(2)]
    everything = [*itertools.chain.from_iterable(itertools.chain.from_iterable(rounds)), float(torch.rand(()))]
    assert len(set(everything)) == len(everything)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    interleave([lambda: None, lambda: None])
    assert torch.equal(torch.get_rng_state(), before)


@dataclasses.dataclass(frozen=True)
class Empty:
    """No options."""


class Slow(Transport):
    """A worker that answers when it is told to, and tells which requests are under way together."""

    name = "slow"

    Options = Empty
    remote = False
    links: ClassVar[list[SlowLink]] = []

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[SlowLink]:
        assert worker is not None
        self.links.append(SlowLink(worker))
        return self.links[-1:]


class SlowLink(Link):
    name = "slow"

    def __init__(self, worker: LocalWorker) -> None:
        self._worker = worker
        self.open: list[Future[Message]] = []
        self.most = 0
        self.fail_at = 0
        self.count = 0

    def submit(self, request: Message) -> Future[Message]:
        future: Future[Message] = Future()
        if request.kind == "evaluate":
            self.count += 1
            self.open.append(future)
            self.most = max(self.most, len(self.open))
            if self.count == self.fail_at:
                self.open.remove(future)
                future.set_exception(ConnectionError("the wire is cut"))
                return future

        def answer() -> None:
            if future in self.open:
                self.open.remove(future)
            if not future.cancelled():
                future.set_result(self._worker.handle(request))

        threading.Timer(0.02 if request.kind == "evaluate" else 0.0, answer).start()
        return future

    def close(self) -> None:
        pass


class Net(nn.Module):
    """Siblings that share their input, dropout between them and what follows, and checkpointing where asked for."""

    def __init__(self, dropout: float = 0.0, checkpointing: str = "") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.q_proj = nn.Linear(6, 4)
        self.k_proj = nn.Linear(6, 4)
        self.v_proj = nn.Linear(6, 4)
        self.o_proj = nn.Linear(4, 2)
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = checkpointing

    def body(self, x: Tensor) -> Tensor:
        x = self.dropout(x) * self.scale
        q = self.q_proj(x)
        y = self.o_proj(self.dropout(torch.tanh(q)))  # another wait, before the siblings ask
        y = self.k_proj(x) * torch.sigmoid(self.v_proj(x)) + torch.cat([y, y], dim=-1)
        return self.o_proj(self.dropout(y))

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointing:
            return self.body(x)
        x = x.requires_grad_()
        y: Tensor = checkpoint(self.body, x, use_reentrant=self.checkpointing == "reentrant")
        return y


def net(to: str = "clear", plugins: PluginManager | None = None, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Net(**kwargs)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return ciphertune.outsource(model, to, layers, plugins=plugins or PluginManager())


def passes(model: nn.Module, inputs: list[Tensor]) -> list[Callable[[], float]]:
    def one(x: Tensor) -> float:
        loss = model(x).square().mean()
        loss.backward()
        return float(loss.detach())

    return [lambda x=x: one(x) for x in inputs]  # type: ignore[misc]


INPUTS = [torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_products_of_different_tasks_are_under_way_together(register: Any) -> None:
    register("ciphertune.transports", Slow)
    model = net("clear+slow://")
    link = Slow.links.pop()
    interleave(passes(model, INPUTS))
    assert link.most == 3
    link.most = 0
    for one in passes(model, INPUTS):
        one()
    assert link.most == 1
    ciphertune.session_of(model).close()


def test_siblings_share_their_product_in_every_task_and_gradients_are_right(recorder: Any) -> None:
    model = net(plugins=recorder.plugins)
    losses = interleave(passes(model, INPUTS[:2]))
    found = model.scale.grad
    siblings = ("q_proj", "k_proj", "v_proj")
    assert recorder.products("forward") == [siblings, siblings, *[("o_proj",)] * 4]
    reference = net()
    assert losses == [one() for one in passes(reference, INPUTS[:2])]
    assert torch.equal(found, reference.scale.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", ["reentrant", "not"])
def test_checkpointing_replays_its_own_random_numbers(checkpointing: str) -> None:
    plain, again = net(dropout=0.5), net(dropout=0.5, checkpointing=checkpointing)
    torch.manual_seed(3)
    losses = interleave(passes(plain, INPUTS))
    torch.manual_seed(3)
    assert losses == interleave(passes(again, INPUTS))
    assert torch.equal(plain.scale.grad, again.scale.grad)  # type: ignore[arg-type]


def test_products_on_threads_of_torch_s_own_do_not_hand_over(recorder: Any) -> None:
    """As backward passes on a GPU: all on one thread, which must not stand still for another task's turn."""
    model = net(plugins=recorder.plugins)

    def task(x: Tensor) -> Callable[[], None]:
        def run() -> None:
            y = model(x)
            thread = threading.Thread(target=lambda: y.square().mean().backward())
            thread.start()
            thread.join(60)
            assert not thread.is_alive()

        return run

    interleave([task(x) for x in INPUTS[:2]])
    reference = net()
    for one in passes(reference, INPUTS[:2]):
        one()
    assert torch.equal(model.scale.grad, reference.scale.grad)  # type: ignore[arg-type]


def test_time_is_counted_once(register: Any) -> None:
    register("ciphertune.transports", Slow)
    model = net("clear+slow://")
    session = ciphertune.session_of(model)
    begin = time.perf_counter()
    interleave(passes(model, INPUTS))
    seconds = time.perf_counter() - begin
    traffic = session.traffic
    assert traffic.encrypt_seconds + traffic.wait_seconds + traffic.decrypt_seconds <= seconds
    assert traffic.turn_seconds > 0
    session.close()


def test_a_wire_that_fails_ends_all_and_another_try_succeeds(register: Any) -> None:
    register("ciphertune.transports", Slow)
    model = net("clear+slow://?deadline=0.3")
    link = Slow.links.pop()
    weights = copy.deepcopy(dict(model.named_parameters()))
    link.fail_at = 4
    interleave(passes(model, INPUTS[:2]))  # it is sent again
    worker = link._worker
    link._worker = None  # type: ignore[assignment]
    link.submit = lambda request: _failed()  # type: ignore[method-assign]
    with pytest.raises(TransportError):
        interleave(passes(model, INPUTS[:2]))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    link._worker = worker
    del link.submit  # type: ignore[method-assign]
    interleave(passes(model, INPUTS[:2]))
    ciphertune.session_of(model).close()


def _failed() -> Future[Message]:
    future: Future[Message] = Future()
    future.set_exception(TransportError("gone"))
    return future


def test_a_veto_ends_all() -> None:
    class Gate:
        left = 3

        @hookimpl
        def ciphertune_before_request(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise VetoError("no more")

    plugins = PluginManager()
    plugins.register(Gate())
    with pytest.raises(VetoError, match="no more"):
        interleave(passes(net(plugins=plugins), INPUTS))
