"""What links share: the requests that have no reply yet, whatever happens to them at the same time."""

from __future__ import annotations

import ast
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

import ciphertune.transport
from ciphertune.errors import PluginError, ProtocolError, QuotaError, ReplyError, TransportError
from ciphertune.transport import PendingReplies

ROUNDS = 300
SECONDS = 120.0


@pytest.fixture
def pending() -> PendingReplies[str]:
    return PendingReplies("10.0.0.5:5555")


@pytest.fixture(autouse=True)
def threads_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*actions: Callable[[], object]) -> None:
    """Run each on a thread of its own, from the same moment on."""
    start = threading.Barrier(len(actions))
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        start.wait(SECONDS)
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert errors == []


def test_replies_find_their_requests(pending: PendingReplies[str]) -> None:
    first, second = pending.add(), pending.add()
    assert first[0] != second[0]
    pending.answer(second[0], "two")
    assert second[1].result(0) == "two"
    assert not first[1].done()
    pending.answer(first[0], "one")
    assert first[1].result(0) == "one"


@pytest.mark.parametrize("way", ["answered", "failed", "cancelled", "all failed", "closed"])
def test_a_settled_request_is_forgotten(pending: PendingReplies[str], way: str) -> None:
    number, reply = pending.add()
    assert number in pending
    assert len(pending) == 1
    {
        "answered": lambda: pending.answer(number, "reply"),
        "failed": lambda: pending.fail(number, "it is gone"),
        "cancelled": reply.cancel,
        "all failed": lambda: pending.fail_all("it is gone"),
        "closed": pending.close,
    }[way]()
    assert reply.done()
    assert number not in pending
    assert len(pending) == 0


def test_what_comes_afterwards_is_ignored(pending: PendingReplies[str]) -> None:
    (answered, reply), (given_up, other) = pending.add(), pending.add()
    pending.answer(answered, "first")
    assert other.cancel()
    for number in (answered, given_up, 0, -1, 1 << 64):
        pending.answer(number, "second")
        pending.fail(number, "too late")
    assert reply.result(0) == "first"
    assert other.cancelled()


def test_errors_name_the_worker(pending: PendingReplies[str]) -> None:
    def failure(why: BaseException | str) -> BaseException | None:
        number, reply = pending.add()
        pending.fail(number, why)
        return reply.exception(0)

    for why in ("it is gone", OSError("it is gone")):
        error = failure(why)
        assert type(error) is TransportError
        assert str(error) == "10.0.0.5:5555: it is gone"
    error = failure(ProtocolError("no header"))
    assert type(error) is ReplyError
    assert str(error) == "10.0.0.5:5555 sent a malformed reply: no header"
    for kept in (ReplyError("of another request"), QuotaError("too much"), TransportError("as it is")):
        assert failure(kept) is kept
    error = failure(ValueError("what was in the activations"))
    assert type(error) is PluginError
    text = "10.0.0.5:5555: the transport failed: unexpected ValueError, a fault of it"
    assert str(error) == text, "the text of an error nobody expected may tell secrets"


def test_a_lost_connection_fails_all_and_later_requests_are_taken(pending: PendingReplies[str]) -> None:
    replies = [pending.add()[1] for _ in range(3)]
    pending.fail_all("the connection was lost")
    errors = [reply.exception(0) for reply in replies]
    assert [str(error) for error in errors] == ["10.0.0.5:5555: the connection was lost"] * 3
    assert len(set(map(id, errors))) == 3, "each caller raises an error of its own"
    number, reply = pending.add()
    pending.answer(number, "again")
    assert reply.result(0) == "again"


def test_after_close_requests_are_refused(pending: PendingReplies[str]) -> None:
    number, reply = pending.add()
    assert pending.close()
    assert not pending.close(), "only the first call closes"
    pending.answer(number, "too late")
    for each in (reply, pending.add()[1]):
        with pytest.raises(TransportError, match=r"10\.0\.0\.5:5555: the link is closed"):
            each.result(0)
    number, reply = pending.add()
    assert reply.done()
    assert number not in pending
    pending.answer(number, "too late")


def cancel_while_answering() -> bool:
    pending: PendingReplies[str] = PendingReplies("worker")
    number, reply = pending.add()
    cancelled: list[bool] = []
    at_once(lambda: pending.answer(number, "reply"), lambda: cancelled.append(reply.cancel()))
    assert reply.cancelled() == cancelled[0]
    assert reply.cancelled() or reply.result(0) == "reply"
    assert len(pending) == 0
    return reply.cancelled()


def test_cancelling_against_answering() -> None:
    """Whichever is first wins, and neither raises."""
    assert {cancel_while_answering() for _ in range(ROUNDS)}


def test_a_cancellation_between_finding_a_future_and_settling_it(pending: PendingReplies[str]) -> None:
    """The narrowest of these races, made certain: the future is cancelled when it is about to be given its result."""

    class Late(Future[str]):
        def set_result(self, result: str) -> None:
            self.cancel()
            super().set_result(result)

        def set_exception(self, exception: BaseException | None) -> None:
            self.cancel()
            super().set_exception(exception)

    for settle in (lambda n: pending.answer(n, "reply"), lambda n: pending.fail(n, "x"), lambda n: pending.close()):
        number, reply = pending.add()
        reply.__class__ = Late
        settle(number)
        assert reply.cancelled()


def answer_while_failing_all() -> None:
    pending: PendingReplies[str] = PendingReplies("worker")
    requests = dict(pending.add() for _ in range(50))
    settled: list[Future[str]] = []
    for reply in requests.values():
        reply.add_done_callback(settled.append)

    def answer() -> None:
        for number in requests:
            pending.answer(number, "reply")

    at_once(answer, lambda: pending.fail_all("the connection was lost"), pending.close)
    assert len(settled) == 50
    assert set(settled) == set(requests.values())
    assert len(pending) == 0


def test_answering_against_failing_all_settles_each_once() -> None:
    for _ in range(ROUNDS // 10):
        answer_while_failing_all()


def submit_while_closing() -> None:
    pending: PendingReplies[str] = PendingReplies("worker")
    replies: list[Future[str]] = []

    def submit() -> None:
        replies.extend(pending.add()[1] for _ in range(30))

    at_once(submit, submit, submit, pending.close)
    assert len(replies) == 90
    assert [reply for reply in replies if not reply.done()] == []
    assert len(pending) == 0


def test_closing_against_submitting_loses_no_future() -> None:
    for _ in range(ROUNDS // 10):
        submit_while_closing()


def test_numbers_are_never_given_twice(pending: PendingReplies[str]) -> None:
    numbers: list[int] = []
    at_once(*[lambda: numbers.extend(pending.add()[0] for _ in range(200))] * 6)
    assert len(set(numbers)) == 1200


def test_only_one_of_many_threads_closes(pending: PendingReplies[str]) -> None:
    first: list[bool] = []
    at_once(*[lambda: first.append(pending.close())] * 8)
    assert sorted(first) == [False] * 7 + [True]


@pytest.mark.parametrize("ending", [ValueError, SystemExit])
def test_callbacks_that_raise(
    pending: PendingReplies[str], ending: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """What a callback of one request raises leaves no other one unsettled."""

    def raises(_: Future[str]) -> None:
        raise ending("a callback of the caller's")

    replies = [pending.add()[1] for _ in range(4)]
    for reply in replies:
        reply.add_done_callback(raises)
    with caplog.at_level(logging.CRITICAL, "concurrent.futures"):
        try:
            pending.fail_all("the connection was lost")
        except SystemExit:
            assert ending is SystemExit
    assert all(reply.done() for reply in replies)
    assert len(pending) == 0


def test_callbacks_may_use_the_link(pending: PendingReplies[str]) -> None:
    """No lock is held while they run: a retry is submitted from one, and others are settled."""
    number, reply = pending.add()
    other, _ = pending.add()
    retried: list[Future[str]] = []

    def retry(_: Future[str]) -> None:
        pending.answer(other, "meanwhile")
        retried.append(pending.add()[1])

    reply.add_done_callback(retry)
    at_once(lambda: pending.fail(number, "once more"))
    assert not retried[0].done()
    assert other not in pending
    at_once(pending.close)
    assert isinstance(retried[0].exception(0), TransportError)


def test_the_contract_comes_first_and_imports_little() -> None:
    tree = ast.parse(Path(ciphertune.transport.__file__).read_text(encoding="utf-8"))
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes[:3] == ["Transport", "Link", "Listener"]
    ours = {
        node.module.split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("ciphertune.")
    }
    assert ours <= {"_support", "errors", "protocol", "selection"}
