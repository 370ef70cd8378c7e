"""One worker's health: how long a failing one is left alone."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from ciphertune.client.connection import BACKOFF_SECONDS, WorkerConnection
from ciphertune.protocol import Message
from ciphertune.transport import Link


class Deaf(Link):
    name = "deaf"

    def submit(self, request: Message) -> Future[Message]:
        return Future()

    def close(self) -> None: ...


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(clock: Clock) -> WorkerConnection:
    return WorkerConnection(Deaf(), longest_backoff=0.3, clock=clock)


def test_the_pause_doubles_up_to_the_longest(worker: WorkerConnection, clock: Clock) -> None:
    pauses = []
    for _ in range(5):
        worker.mark_failed("cut")
        pauses.append(worker.not_before - clock.now)
        clock.now = worker.not_before
    most = [BACKOFF_SECONDS, 2 * BACKOFF_SECONDS, 4 * BACKOFF_SECONDS, 0.3, 0.3]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, most, strict=True))
    assert (worker.failures, worker.last_problem) == (5, "cut")
    worker.mark_answered()
    worker.mark_failed("cut again")
    assert BACKOFF_SECONDS / 2 <= worker.not_before - clock.now <= BACKOFF_SECONDS


def test_requests_that_fail_together_are_one_failure(worker: WorkerConnection, clock: Clock) -> None:
    for number in range(4):
        worker.mark_failed(str(number))
    assert (worker.failures, worker.last_problem) == (1, "3")
    clock.now += BACKOFF_SECONDS
    worker.mark_failed("later")
    assert worker.failures == 2


def test_a_forgotten_session_is_opened_again_at_once_but_not_for_ever(worker: WorkerConnection, clock: Clock) -> None:
    worker.session = "first"
    worker.mark_forgotten("first", "not known")
    assert (worker.session, worker.failures) == (None, 0)
    worker.session = "second"
    worker.mark_forgotten("first", "not known")
    assert worker.session == "second", "another thread has opened one already"
    worker.mark_forgotten("second", "not known")
    assert (worker.session, worker.failures) == (None, 1)
    worker.mark_answered()
    worker.session = "third"
    worker.mark_forgotten("third", "not known")
    assert worker.failures == 0
