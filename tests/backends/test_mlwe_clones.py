"""Masks of the mlwe backend on machines that are copied: what tells of it, and what is dropped then."""

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mask_bench import THREAD, Bench, Machine, read, until

from ciphertune.errors import SecurityError
from ciphertune_mlwe import clones
from ciphertune_mlwe.clones import OLDEST_SECONDS, CloneWatch, read_generation

BOTH = pytest.mark.parametrize("tokens", [4, 200])


def test_masks_of_a_copied_machine_are_dropped(bench: Callable[..., Bench]) -> None:
    machine = Machine(7)
    made = bench(machine=machine)
    made.stock.take("a", 4)
    machine.pass_seconds(10_000)
    machine.wall += 10_000
    made.stock.take("a", 4)
    assert len(made.made) == 1, "where the machine tells of copies, masks do not age and clocks do not count"
    machine.generation = 8
    made.stock.take("a", 4)
    made.stock.take("a", 4)
    assert len(made.made) == 2


def test_without_a_generation_masks_age(bench: Callable[..., Bench]) -> None:
    machine = Machine(None)
    made = bench(machine=machine)
    made.stock.take("a", 4)
    machine.pass_seconds(OLDEST_SECONDS - 1)
    made.stock.take("a", 4)
    assert len(made.made) == 1
    machine.pass_seconds(2)
    made.stock.take("a", 4)
    assert len(made.made) == 2


@pytest.mark.parametrize("jump", [60.0, -60.0])
def test_without_a_generation_a_jump_of_the_clock_counts(bench: Callable[..., Bench], jump: float) -> None:
    machine = Machine(None)
    made = bench(machine=machine)
    made.stock.take("a", 4)
    for _ in range(20):
        # A clock that is set right bit by bit.
        machine.wall += 1
        made.stock.take("a", 4)
    assert len(made.made) == 1
    machine.wall += jump
    made.stock.take("a", 4)
    assert len(made.made) == 2


@BOTH
def test_a_mask_is_not_used_if_the_machine_was_copied_while_it_was_made(
    bench: Callable[..., Bench], tokens: int
) -> None:
    """Both copies would go on with the same secrets."""
    machine = Machine(1)
    made = bench(machine=machine)

    def copied() -> None:
        made.meanwhile = lambda: None
        machine.generation = 2

    made.meanwhile = copied
    mask = made.stock.take("a", tokens)
    assert len(made.made) == 2
    assert torch.equal(read(mask), made.bodies[1][:, :tokens])


def test_masks_ahead_are_dropped_with_the_machine(bench: Callable[..., Bench]) -> None:
    machine = Machine(1)
    made = bench(machine=machine, ahead=1 << 20)
    for product in "abab":
        read(made.stock.take(product, 200))
    until(lambda: len(made.waiting()) == 2)
    old = len(made.made)
    machine.generation = 2
    found = read(made.stock.take("a", 200))
    assert any(torch.equal(found, body) for body in made.bodies[old:])
    assert not any(torch.equal(found, body) for body in made.bodies[:old])


def test_masks_under_way_on_the_thread_are_dropped_with_the_machine(bench: Callable[..., Bench]) -> None:
    machine = Machine(1)
    made = bench(machine=machine, ahead=1 << 20)
    marked: list[int] = []

    def copied() -> None:
        if threading.current_thread().name == THREAD and not marked:
            marked.append(len(made.made))
            machine.generation = 2

    made.meanwhile = copied
    for product in "ab" * 4:
        read(made.stock.take(product, 200))
    until(lambda: bool(marked) and len(made.made) > marked[0])
    used = [read(made.stock.take(product, 200)) for product in "ab" * 4]
    assert not any(torch.equal(each, made.bodies[marked[0]]) for each in used)


def test_masks_in_hand_are_refused_after_a_copy(bench: Callable[..., Bench]) -> None:
    machine = Machine(1)
    made = bench(machine=machine)
    first = made.stock.take("a", 4)
    machine.generation = 2
    made.stock.take("a", 4)
    with pytest.raises(SecurityError):
        read(first)


def test_the_generation_is_read_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "vmclock0"
    monkeypatch.setattr(clones, "_DEVICE", tmp_path / "none")
    assert read_generation() is None
    assert read_generation() is None
    monkeypatch.setattr(clones, "_DEVICE", device)

    def write(marker: int, magic: int = 0x4B4C4356) -> None:
        device.write_bytes(struct.pack("<IIHBBIQ", magic, 96, 1, 0, 0, 2, marker) + bytes(72))

    write(77)
    assert read_generation() == 77
    watch = CloneWatch()
    assert not watch.copied()
    write(78)
    assert watch.copied()
    assert not watch.copied(), "a copy is told of once"
    write(78, 0x12345678)
    assert read_generation() is None
    device.write_bytes(b"short")
    assert read_generation() is None


def test_a_device_that_comes_or_goes_counts_as_a_copy() -> None:
    machine = Machine(None)
    watch = machine.watch()
    assert not watch.copied()
    for generation in (1, None):
        machine.generation = generation
        assert watch.copied()
        assert not watch.copied()


def test_clocks_of_this_machine_do_not_tell_of_copies() -> None:
    watch = CloneWatch(lambda: None)
    assert not watch.copied()
    assert watch.fresh(watch.now())
    assert not watch.fresh(watch.now() - OLDEST_SECONDS - 1)
