"""Masks that the mlwe backend makes before the data: which, how many, and what ends it."""

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mask_bench import THREAD, Bench, read, until
from mlwe_halves import Halves, random_codes

from ciphertune_mlwe import masks
from ciphertune_mlwe.masks import Order

TOKENS = 200
ROOM = 1 << 20


def cycle(made: Bench, products: str) -> list[torch.Tensor]:
    """Take a mask for each product, one after the other."""
    return [read(made.stock.take(product, TOKENS)) for product in products]


def test_masks_made_ahead_are_the_ones_that_are_used(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=ROOM)
    cycle(made, "abcabc")
    until(lambda: sorted(made.waiting(), key=str) == [Order(product, TOKENS) for product in "abc"])
    used = cycle(made, "abc")
    numbers = [next(n for n, body in enumerate(made.bodies) if torch.equal(body, one)) for one in used]
    assert set(numbers) <= set(made.ahead)
    assert len(set(numbers)) == 3
    assert [made.orders[number].product for number in numbers] == list("abc")


def test_a_product_that_comes_twice_in_a_row_is_made_twice(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=ROOM)
    seen = cycle(made, "aab" * 4)
    assert torch.unique(torch.cat(seen, dim=1), dim=1).shape[1] == 12 * TOKENS


def test_banks_are_made_ahead_too(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=ROOM)
    for _ in range(6):
        for product in "ab":
            read(made.stock.take(product, 100))
    until(lambda: bool(made.ahead))
    assert set(made.orders) == {Order("a", 256), Order("b", 256)}


def test_banks_that_are_used_up_make_room_for_those_that_follow(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=2 * Bench.size(Order("a", 256)))
    masks = [made.stock.take(product, 128) for product in "ababa"]
    # Now it is known what follows; were the next taken at once, it could be made twice.
    until(lambda: made.waiting() == [Order("b", 256)])
    masks += [made.stock.take(product, 128) for product in "bab"]
    until(lambda: made.waiting() == [Order("a", 256), Order("b", 256)])
    taken = [made.stock.take(product, 128) for product in "ab"]
    assert [len(made.made), made.waiting()] == [6, []], "those that lay ready were taken"
    assert torch.unique(torch.cat([read(mask) for mask in masks + taken], dim=1), dim=1).shape[1] == 10 * 128


def test_a_bank_that_is_used_up_wakes_nobody_where_nobody_waits(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=ROOM)
    made.stock.in_background = False
    for _ in range(4):
        read(made.stock.take("a", 128))
    assert made.stock._asked.empty()


def test_a_bank_that_is_used_up_is_kept_by_its_masks_alone(bench: Callable[..., Bench]) -> None:
    made = bench()
    first, second = made.stock.take("a", 128), made.stock.take("a", 128)
    assert made.stock._banks[""] == {}
    assert first._block is second._block is not None
    gone = weakref.ref(first._block)
    for mask in (first, second):
        mask.close()
    assert gone() is None


@pytest.mark.parametrize(("tokens", "apart"), [(1, True), (8, True), (9, False), (100, False)])
def test_few_tokens_have_their_masks_side_by_side(bench: Callable[..., Bench], tokens: int, apart: bool) -> None:
    mask = bench().stock.take("a", tokens)
    assert mask._block is not None
    for memory in (mask._block.body, mask._block.hint):
        assert memory.matrix[:, 0].is_contiguous() is apart
        assert memory.matrix[0].is_contiguous() is not apart


@pytest.mark.parametrize(("tokens", "size", "share"), [(200, 200, 1.0), (64, 256, 0.25), (1, 256, 1 / 256)])
def test_what_is_made_for_a_request_is_what_it_takes(
    bench: Callable[..., Bench], tokens: int, size: int, share: float
) -> None:
    made = bench(ahead=ROOM)
    made.stock.in_background = False
    assert [made.stock.make("a", tokens) for _ in range(2)] == [share] * 2
    assert made.orders == [Order("a", size)] * 2
    assert made.waiting() == [Order("a", size)], "the one before is forgotten"
    assert torch.equal(read(made.stock.take("a", tokens)), made.bodies[1][:, :tokens])
    assert made.stock._thread is None


def test_nothing_is_made_for_a_request_where_nothing_is_made_ahead(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=0)
    assert made.stock.make("a", TOKENS) == 0.0
    assert made.made == []


@pytest.mark.parametrize("remote", [True, False])
def test_masks_are_made_ahead_where_processors_are_idle(remote: bool) -> None:
    halves = Halves(random_codes(16, 24), ahead="1")
    halves.client.begin(b"model", remote)
    for _ in range(4):
        halves.product(torch.ones(200, 24))
    assert (halves.client._stock._thread is not None) is remote
    halves.client.close()


def test_without_memory_for_it_nothing_is_made_ahead(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=0)
    cycle(made, "ab" * 5)
    assert made.ahead == []
    assert len(made.made) == 10
    assert made.stock._thread is None


def test_masks_ahead_stay_within_their_memory(bench: Callable[..., Bench]) -> None:
    each = Bench.size(Order("a", TOKENS))
    made = bench(ahead=2 * each)
    for product in "abcd" * 3:
        cycle(made, product)
        assert len(made.waiting()) <= 3, "two, and one of those before them"
    until(lambda: sorted(order.product for order in made.waiting()) == ["a", "b"])


def test_banks_take_from_the_memory_of_masks_ahead(bench: Callable[..., Bench]) -> None:
    bank = Bench.size(Order("a", 256))
    made = bench(ahead=bank + 1)
    made.stock.take("few", 1)
    cycle(made, "abab")
    assert made.waiting() == []
    assert made.ahead == [], "no block fits beside the bank"
    assert not made.stock.make_next()


def test_masks_that_nobody_takes_are_dropped(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=ROOM)
    cycle(made, "abab")
    until(lambda: bool(made.waiting()))
    cycle(made, "xyxyxyxy")
    until(lambda: {order.product for order in made.waiting()} == {"x", "y"})
    with made.stock._lock:
        assert all(made.stock._ready.values()), "nothing stays of orders that are over"


def test_what_is_remembered_of_the_order_is_bounded(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_MOST_ORDERS", 8)
    made = bench(ahead=ROOM)
    for tokens in range(129, 169):
        made.stock.take("a", tokens)
    with made.stock._lock:
        assert len(made.stock._next) == 8
        assert Order("a", 167) in made.stock._next


def test_closing_ends_the_thread(bench: Callable[..., Bench]) -> None:
    made = bench(ahead=ROOM)
    cycle(made, "abab")
    thread = made.stock._thread
    assert thread is not None
    assert thread.name == THREAD
    made.stock.close()
    assert not thread.is_alive()
    assert made.waiting() == []


def test_a_stock_that_is_forgotten_ends_its_thread() -> None:
    held = [Bench(ahead=ROOM)]
    cycle(held[0], "abab")
    until(lambda: len(held[0].waiting()) == 2)
    thread, stock = held[0].stock._thread, weakref.ref(held[0].stock)
    assert thread is not None
    held.clear()

    def gone() -> bool:
        gc.collect()
        return stock() is None

    until(gone)
    thread.join(60)
    assert not thread.is_alive()


def test_a_failure_ahead_is_the_failure_of_who_asks(bench: Callable[..., Bench]) -> None:
    """Nothing is made ahead any more, and the thread's error does not get lost in it."""
    made = bench(ahead=ROOM)
    failing = threading.Event()

    def fails() -> None:
        if failing.is_set():
            raise MemoryError

    made.meanwhile = fails
    cycle(made, "abab")
    until(lambda: len(made.waiting()) == 2)
    failing.set()
    cycle(made, "a")
    until(lambda: made.stock._ahead == 0)
    assert made.waiting() == []
    with pytest.raises(MemoryError):
        cycle(made, "b")
    failing.clear()
    count = len(made.ahead)
    cycle(made, "abab")
    assert len(made.ahead) == count


def test_the_thread_works_alone_and_steps_back() -> None:
    from ciphertune_mlwe import native

    parts: list[tuple[int, int, int]] = []

    def task(start: int, stop: int) -> None:
        parts.append((start, stop, threading.get_ident()))

    def ahead() -> int:
        native.step_back()
        native.over_rows(100, 8, task)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else 19

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(ahead).result() == 19
    ((start, stop, thread),) = parts
    assert (start, stop) == (0, 100)
    assert thread != threading.get_ident()
    if sys.platform == "linux":
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19, "other threads keep their priority"
