"""Sessions of clients that are gone give way to their own client's, and to nobody else's while it is there."""

from __future__ import annotations

from typing import Any

import pytest

from ciphertune.errors import QuotaError, UnknownSessionError
from ciphertune.worker.sessions import ABSENCE_SECONDS, SessionLimits, Sessions, WorkerSession
from ciphertune.worker.usage import SessionRecord


class Half:
    """A backend's half that knows whether it was closed."""

    closed = False

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def table(clock: Clock, **limits: Any) -> Sessions:
    return Sessions(SessionLimits(**limits), clock)


def opened(sessions: Sessions, peer: str, connection: int | None = None, nbytes: int = 1) -> tuple[str, Any]:
    half: Any = Half()
    sessions.require_room(peer, nbytes)
    name = sessions.add(WorkerSession(half, [], nbytes, SessionRecord(peer, "", "mlwe", 0.0, 0.0)))
    sessions.seen(name, peer, connection)
    return name, half


def test_a_client_that_crashed_and_comes_again_is_not_locked_out(clock: Clock) -> None:
    sessions = table(clock, sessions=2)
    halves = []
    for connection in range(10):
        halves.append(opened(sessions, "a", connection)[1])
        sessions.left("a", connection)
        clock.now += 1
    assert sessions.of("a") == 2
    assert [half.closed for half in halves] == [True] * 8 + [False] * 2, "the oldest first, and only as needed"


def test_no_session_is_given_up_while_its_client_is_there(clock: Clock) -> None:
    sessions = table(clock, sessions=2)
    for connection in (1, 2):
        opened(sessions, "a", connection)
    with pytest.raises(QuotaError, match="2 sessions of this client") as refusal:
        opened(sessions, "a", 3)
    assert "all who come from one address" in str(refusal.value)
    assert "--max-sessions" in str(refusal.value)
    # Nor by the end of somebody else's connection.
    sessions.left("b", 1)
    with pytest.raises(QuotaError):
        opened(sessions, "a", 3)


def test_a_client_that_comes_back_over_another_connection_keeps_its_session(clock: Clock) -> None:
    sessions = table(clock, sessions=1)
    name, half = opened(sessions, "a", 1)
    sessions.left("a", 1)
    sessions.seen(name, "a", 2)
    with pytest.raises(QuotaError):
        opened(sessions, "a", 3)
    sessions.find(name, "a")
    assert not half.closed


def test_a_session_that_two_connections_use_needs_both_to_end(clock: Clock) -> None:
    sessions = table(clock, sessions=1)
    name, half = opened(sessions, "a", 1)
    sessions.seen(name, "a", 2)
    sessions.left("a", 1)
    with pytest.raises(QuotaError):
        opened(sessions, "a", 3)
    sessions.left("a", 2)
    opened(sessions, "a", 3)
    assert half.closed


def test_a_connection_that_ended_before_its_session_was_open(clock: Clock) -> None:
    sessions = table(clock, sessions=1)
    sessions.left("a", 1)
    opened(sessions, "a", 1)
    opened(sessions, "a", 2)
    assert sessions.of("a") == 1


def test_the_room_of_all_is_not_taken_from_a_client_that_was_away_for_a_moment(clock: Clock) -> None:
    sessions = table(clock, all_sessions=1)
    _, half = opened(sessions, "a", 1)
    with pytest.raises(QuotaError):
        opened(sessions, "b", 2)
    sessions.left("a", 1)
    clock.now += ABSENCE_SECONDS - 1
    with pytest.raises(QuotaError):
        opened(sessions, "b", 2)
    assert not half.closed
    clock.now += 1
    opened(sessions, "b", 2)
    assert half.closed


def test_a_quota_of_its_own_that_is_full_takes_nothing_from_others(clock: Clock) -> None:
    sessions = table(clock, nbytes=10, all_nbytes=100)
    _, absent = opened(sessions, "a", 1, nbytes=10)
    sessions.left("a", 1)
    clock.now += ABSENCE_SECONDS
    opened(sessions, "b", 2, nbytes=8)
    with pytest.raises(QuotaError, match="MB of keys"):
        opened(sessions, "b", 2, nbytes=8)
    assert not absent.closed


def test_what_is_evaluated_keeps_its_session(clock: Clock) -> None:
    sessions = table(clock, sessions=1)
    name, half = opened(sessions, "a", 1)
    session = sessions.find(name, "a")
    with sessions.using(session):
        sessions.left("a", 1)
        with pytest.raises(QuotaError):
            opened(sessions, "a", 2)
        sessions.dismiss("a")
        assert not half.closed, "its memory is in use"
        with pytest.raises(UnknownSessionError):
            sessions.find(name, "a")
    assert half.closed
    with pytest.raises(UnknownSessionError), sessions.using(session):
        pass


def test_records_say_who_when_and_how_much(clock: Clock) -> None:
    sessions = table(clock)
    name, _ = opened(sessions, "a")
    sessions.count(name, "a", (100, 200), 0.5, False)
    sessions.count(name, "a", (10, 20), 0.25, True)
    sessions.count(name, "b", (1000, 1000), 9.0, False)
    (record,) = sessions.take_records()
    assert (record.client, record.products, record.errors) == ("a", 2, 1)
    assert (record.bytes_in, record.bytes_out, record.evaluate_seconds, record.ended) == (110, 220, 0.75, None)
    sessions.close(name, "a")
    (ended,) = sessions.take_records()
    assert (ended.id, ended.why) == (record.id, "closed by its client")
    assert ended.ended is not None
    assert name not in str(ended), "the record does not admit to the session"
    assert sessions.take_records() == []
