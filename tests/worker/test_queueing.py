"""Whose product is next, by evaluation time alone."""

from __future__ import annotations

import pytest

from ciphertune.protocol import Message
from ciphertune.worker.queueing import Client, FairQueue, Job, Quota
from ciphertune.worker.worker import _Group

LARGE, SMALL = 8_000, 100
"""Bytes of products, which take a microsecond each."""


def job(size: int) -> Job:
    return Job(Message("evaluate"), size, lambda frames, release: None, 0.0, reserved=size)


def evaluate(queue: FairQueue, client: Client, each: Job) -> None:
    queue.charge(client, each, each.reserved / 1e6)
    queue.ended(client, each)


@pytest.fixture
def queue() -> FairQueue:
    """Whose clients "large" and "small" had a product each."""
    queue = FairQueue(Quota())
    for peer, size in (("large", LARGE), ("small", SMALL)):
        queue.push(queue.client(peer, 0.0), job(size))
        evaluate(queue, *queue.pop())
        queue.clients[peer].virtual_time = 0.0
    return queue


def test_the_product_that_ends_first_is_next(queue: FairQueue) -> None:
    large, small = queue.clients["large"], queue.clients["small"]
    queue.push(large, job(LARGE))
    turns = []
    for _ in range(2 * LARGE // SMALL):
        queue.push(small, job(SMALL))
        client, each = queue.pop()
        evaluate(queue, client, each)
        turns.append(client.peer)
        if client is large:
            break
    # Who used as much time as a large product takes has had its share.
    assert turns[-1] == "large"
    assert abs(len(turns) - LARGE // SMALL) <= 1


def test_shares_of_clients_that_always_wait_are_equal(queue: FairQueue) -> None:
    sizes = {"large": LARGE, "small": SMALL, "middle": LARGE // 3, "other": LARGE}
    for peer, size in sizes.items():
        queue.push(queue.client(peer, 0.0), job(size))
    used = dict.fromkeys(sizes, 0)
    for _ in range(2_000):
        client, each = queue.pop()
        evaluate(queue, client, each)
        used[client.peer] += each.reserved
        queue.push(client, job(sizes[client.peer]))
        assert max(used.values()) - min(used.values()) <= 2 * LARGE


def test_a_small_product_is_let_into_a_large_one_until_it_had_its_share(queue: FairQueue) -> None:
    large, small = queue.clients["large"], queue.clients["small"]
    queue.push(large, job(LARGE))
    evaluated = [queue.pop()]
    count = 0
    while True:
        queue.push(small, job(SMALL))
        found = queue.pop_beside(small, evaluated)
        if found is None:
            break
        evaluate(queue, *found)
        count += 1
    assert LARGE // SMALL - 1 <= count <= LARGE // SMALL
    assert queue.pop_within(*evaluated[0]) is None
    # Where it takes longer than the one before it, there is more to share.
    queue.charge(*evaluated[0], 2 * LARGE / 1e6)
    assert queue.pop_within(*evaluated[0]) is not None


def test_between_products_those_that_come_next_count(queue: FairQueue) -> None:
    large, small = queue.clients["large"], queue.clients["small"]
    queue.push(large, job(LARGE))
    queue.push(small, job(SMALL))
    assert queue.pop_beside(small, []) is not None
    queue.push(small, job(LARGE))
    assert queue.pop_beside(small, []) is None


def test_a_short_product_that_was_disturbed_stays_one() -> None:
    group = _Group(None, None)  # type: ignore[arg-type]
    group.timed("forward", 100, 0.0005, 0.0005)
    group.timed("forward", 100, 0.005, 0.0005)
    assert group.short["forward"] == 100
    group.timed("forward", 100, 0.005, 0.005)
    assert group.short["forward"] == 99
    group.timed("forward", 100, 0.0005, 0.0005)
    # A backend may compute on threads of its own.
    group.timed("forward", 100, 0.5, 0.0)
    assert group.short["forward"] == 99
