"""Refusals are counted, and logged once a minute and peer."""

from __future__ import annotations

import logging

import pytest

from ciphertune.worker.refusals import Refusals


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    fields = [vars(record)["fields"] for record in caplog.records]
    caplog.clear()
    return [(each["client"], each["times"]) for each in fields]


def test_a_line_a_minute_and_peer_with_the_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(20):
        refusals.note("10.0.0.7", "its key is not authorised")
    refusals.note("10.0.0.8", "it failed the handshake")
    assert told(caplog) == [("10.0.0.7", 1), ("10.0.0.8", 1)]
    clock.now = 60.0
    refusals.note("10.0.0.7", "its key is not authorised")
    assert told(caplog) == [("10.0.0.7", 20)], "those since the last line"
    assert refusals.total == 22


def test_many_peers_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refusals = Refusals(Clock())
    for number in range(5000):
        refusals.note(f"10.{number}", "no")
    assert len(told(caplog)) == 60
    assert len(refusals._told) <= 1024
    assert refusals.total == 5000
