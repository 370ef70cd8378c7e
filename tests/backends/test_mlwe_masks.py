"""Masks of the mlwe backend: each used once, in the process that made it, and of no use afterwards."""

import copy
import os
import pickle
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_bench import FEATURES, OUTPUTS, Bench, at_once, read
from mlwe_halves import CPU, Halves, error_of, random_codes

from ciphertune.errors import SecurityError
from ciphertune_mlwe import mask_memory, native, spare_memory
from ciphertune_mlwe.mask_memory import MaskMemory
from ciphertune_mlwe.masks import Block, Mask, Order
from ciphertune_mlwe.spare_memory import SpareMemory
from ciphertune_mlwe.transforms import make_transforms

BANK, WHOLE = 4, 200
"""Tokens of a request that shares a bank, and of one that does not."""
BOTH = pytest.mark.parametrize("tokens", [BANK, WHOLE])


@pytest.fixture
def spare() -> Iterator[SpareMemory]:
    """The memory that this process keeps for masks, empty before and after."""
    spare_memory.SPARE.clear()
    yield spare_memory.SPARE
    spare_memory.SPARE.clear()


def hint_of(mask: Mask) -> torch.Tensor:
    return mask.reveal(torch.clone)


@BOTH
def test_a_mask_is_used_once(bench: Callable[..., Bench], tokens: int) -> None:
    mask = bench().stock.take("a", tokens)
    assert read(mask).shape == (FEATURES, tokens)
    with pytest.raises(SecurityError, match="used once"):
        read(mask)
    for _ in range(2):
        assert hint_of(mask).shape == (OUTPUTS, tokens), "the hint serves until the reply is decrypted"
    mask.close()
    mask.close()
    with pytest.raises(SecurityError, match="used once"):
        hint_of(mask)


@BOTH
def test_of_threads_that_use_one_mask_one_succeeds(bench: Callable[..., Bench], tokens: int) -> None:
    made = bench()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            mask = made.stock.take("a", tokens)
            outcomes = at_once(*[lambda mask=mask: read(mask)] * 3)  # type: ignore[misc]
            assert sorted(type(each.exception()) is SecurityError for each in outcomes) == [False, True, True]
    finally:
        sys.setswitchinterval(before)


@BOTH
def test_a_mask_whose_use_fails_is_used_up(bench: Callable[..., Bench], tokens: int) -> None:
    mask = bench().stock.take("a", tokens)

    def fails(body: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mask.take(fails)
    with pytest.raises(SecurityError):
        read(mask)


@BOTH
def test_nothing_is_taken_from_a_closed_stock(bench: Callable[..., Bench], tokens: int) -> None:
    made = bench()
    held, used = (made.stock.take("a", tokens) for _ in range(2))
    read(used)
    count = len(made.made)
    made.stock.close()
    for use in (lambda: made.stock.take("a", tokens), lambda: read(held), lambda: hint_of(held), lambda: hint_of(used)):
        with pytest.raises(SecurityError):
            use()
    made.stock.close()
    assert len(made.made) == count, "a closed stock makes nothing"


@BOTH
def test_nothing_is_decrypted_while_the_stock_closes(bench: Callable[..., Bench], tokens: int) -> None:
    stock = bench().stock
    mask = stock.take("a", tokens)
    read(mask)

    def closes(hint: torch.Tensor) -> torch.Tensor:
        stock.close()
        return hint.clone()

    with pytest.raises(SecurityError):
        mask.reveal(closes)


def test_nothing_is_encrypted_under_a_bank_while_the_stock_closes(bench: Callable[..., Bench]) -> None:
    stock = bench().stock

    def closes(body: torch.Tensor) -> torch.Tensor:
        stock.close()
        return body.clone()

    mask = stock.take("a", BANK)
    with pytest.raises(SecurityError):
        mask.take(closes)


def test_masks_are_not_copied(bench: Callable[..., Bench]) -> None:
    mask = bench().stock.take("a", BANK)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SecurityError, match="copied"):
            copied(mask)
    assert read(mask).shape == (FEATURES, BANK), "nothing was used up"


def test_columns_of_a_bank_are_handed_out_once_and_overwritten(bench: Callable[..., Bench]) -> None:
    made = bench()
    taken = [made.stock.take("a", 5) for _ in range(60)]
    # 51 requests of five tokens fit 256 columns.
    assert made.orders == [Order("a", 256)] * 2
    banks = [mask._block.body.matrix for mask in (taken[0], taken[-1]) if mask._block is not None]
    seen = torch.cat([read(mask) for mask in taken], dim=1)
    assert torch.unique(seen, dim=1).shape[1] == 300
    assert torch.equal(seen, torch.cat([made.bodies[0][:, :255], made.bodies[1][:, :45]], dim=1))
    for now, before, count in zip(banks, made.bodies, (255, 45), strict=True):
        assert (now[:, :count] != before[:, :count]).float().mean() > 0.99
        assert (now[:, :count] != 0).float().mean() > 0.99
        assert torch.unique(now[:, :count], dim=1).shape[1] == count
        assert torch.equal(now[:, count:], before[:, count:])


@pytest.mark.parametrize("used", [False, True])
def test_masks_that_are_dropped_are_overwritten(bench: Callable[..., Bench], used: bool) -> None:
    mask = bench().stock.take("a", 5)
    assert mask._block is not None
    matrices = mask._block.body.matrix, mask._block.hint.matrix
    before = [matrix.clone() for matrix in matrices]
    if used:
        read(mask)
    del mask
    for matrix, old in zip(matrices, before, strict=True):
        assert (matrix[:, :5] != old[:, :5]).all()
        assert torch.equal(matrix[:, 5:], old[:, 5:])


@BOTH
def test_masks_leave_the_generator_of_torch_alone(bench: Callable[..., Bench], tokens: int) -> None:
    halves, stock = Halves(random_codes(8, 16)), bench().stock
    before = torch.get_rng_state()
    read(stock.take("a", tokens))
    stock.take("a", tokens)
    stock.close()
    halves.product(torch.ones(tokens, 16))
    halves.client.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_columns_that_cannot_be_overwritten_make_the_bank_unusable(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    first, second = (made.stock.take("a", 5) for _ in range(2))

    def broken(count: int) -> bytes:
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", broken)
        patch.setattr(mask_memory, "_here", threading.local())
        with pytest.raises(SecurityError, match="no randomness"):
            read(first)
    with pytest.raises(SecurityError):
        read(second)


def test_requests_of_many_tokens_have_secrets_of_their_own(bench: Callable[..., Bench]) -> None:
    made = bench()
    for tokens in (129, 128, 128, 129):
        made.stock.take("a", tokens)
    assert [order.tokens for order in made.orders] == [129, 256, 129]
    alone = bench(columns=0)
    for _ in range(3):
        alone.stock.take("a", 1)
    assert [order.tokens for order in alone.orders] == [1, 1, 1]


def test_products_have_banks_of_their_own(bench: Callable[..., Bench]) -> None:
    made = bench()
    for product in "abab":
        made.stock.take(product, 1)
    assert made.orders == [Order("a", 256), Order("b", 256)]


def test_memory_of_whole_blocks_is_wiped(bench: Callable[..., Bench], spare: SpareMemory) -> None:
    mask = bench().stock.take("a", WHOLE)
    block = mask._block
    assert block is not None
    body, hint = (memory._map for memory in (block.body, block.hint))
    assert body is not None
    assert hint is not None
    sizes = len(body), len(hint)
    body = None  # Nothing else knows of it, as ever where nobody looks.
    read(mask)
    assert spare.nbytes == sizes[0]
    assert any(hint[:])
    hint = None
    mask.close()
    assert spare.nbytes == sum(sizes)
    for size in set(sizes):
        assert not any(spare.take(size)[:])


def test_banks_that_are_used_up_are_given_back(bench: Callable[..., Bench]) -> None:
    made = bench()
    mask = made.stock.take("a", 100)
    assert mask._block is not None
    body = weakref.ref(mask._block.body)
    read(mask)
    for _ in range(2):
        read(made.stock.take("a", 100))
    assert len(made.made) == 2
    assert body() is not None, "the reply is still to be decrypted"
    del mask
    assert body() is None


def in_a_fork(*uses: Callable[[], Any]) -> list[str]:
    """What comes of each in a forked process: its value, or the name of the error."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        for use in uses:
            try:
                told.append(str(use()))
            except BaseException as error:  # the child must end here
                told.append(type(error).__name__)
        os.write(theirs, "\n".join(told).encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = os.read(ours, 4096).decode().split("\n")
    for end in (ours, theirs):
        os.close(end)
    return found


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
# Later Pythons warn of any fork in a process with threads, which is what is tried here.
forks_with_threads = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@forks
@forks_with_threads
@BOTH
def test_a_forked_process_can_use_no_mask(bench: Callable[..., Bench], tokens: int) -> None:
    stock = bench(ahead=1 << 20).stock
    held = stock.take("a", tokens)
    # A lock that another thread holds at that time is nobody's afterwards.
    with stock._lock:
        found = in_a_fork(lambda: stock.take("a", tokens), lambda: read(held), lambda: hint_of(held), stock.close)
    assert found == ["SecurityError"] * 3 + ["None"]
    assert read(held).shape == (FEATURES, tokens), "the parent goes on"
    assert stock.take("a", tokens) is not held


@forks
@forks_with_threads
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux wipes memory in forks")
def test_a_forked_process_finds_zeros_whatever_its_number_is() -> None:
    memory = MaskMemory(3, 4, CPU)
    memory.matrix.fill_(7)

    def as_if_not_wiped() -> bool:
        assert memory._map is not None
        memory._map[: len(memory._tag)] = memory._tag
        return memory.intact

    def same_number() -> bool:
        memory._process = os.getpid()
        return memory.intact

    total = lambda: int(memory.matrix.abs().sum())  # noqa: E731
    assert in_a_fork(lambda: memory.intact, same_number, total) == ["False", "False", "0"]
    assert in_a_fork(as_if_not_wiped) == ["False"], "the process is compared where memory is not wiped"
    assert memory.intact
    assert (memory.matrix == 7).all()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="there is nothing that tells of mappings")
def test_masks_are_in_no_core_dump_and_no_fork() -> None:
    memory = MaskMemory(64, 64, CPU)
    address = memory.matrix.data_ptr()
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    (flags,) = (flags.split() for start, stop, flags in mappings if int(start, 16) <= address < int(stop, 16))
    assert {"dd", "wf"} <= set(flags)


@forks
@forks_with_threads
def test_compiled_loops_run_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "thread_count", lambda: 2)

    def rows() -> int:
        done: list[int] = []
        native.over_rows(64, 8, lambda start, stop: done.append(stop - start))
        return sum(done)

    def norms() -> float:
        found: float = make_transforms(CPU).norms(torch.ones(256, 256)).sum().item()
        return found

    assert rows() == 64
    assert norms() == 4096
    assert in_a_fork(rows, norms) == ["64", "4096.0"]


def test_memory_that_was_wiped_is_not_intact() -> None:
    memory = MaskMemory(3, 4, CPU)
    memory.matrix.fill_(7)
    assert memory.intact
    assert memory._map is not None
    memory._map[:] = bytes(len(memory._map))
    assert not memory.intact
    spoiled, freed = MaskMemory(3, 4, CPU), MaskMemory(3, 4, CPU)
    spoiled.spoil()
    freed.free()
    freed.spoil()
    assert not spoiled.intact
    assert not freed.intact


def test_memory_of_a_used_mask_is_wiped_and_serves_the_next_of_its_size(spare: SpareMemory) -> None:
    first, other = MaskMemory(3, 4, CPU), MaskMemory(3, 5, CPU)
    first.matrix.fill_(7)
    address = first.matrix.data_ptr()
    first.free()
    other.free()
    second = MaskMemory(3, 4, CPU)
    assert second.matrix.data_ptr() == address
    assert (second.matrix == 0).all()
    assert second.intact
    assert not first.intact, "whoever had it before does not have it now"
    first.free()
    first.spoil()
    assert second.intact


def test_memory_that_a_tensor_still_shows_serves_no_other_mask(spare: SpareMemory) -> None:
    memory = MaskMemory(3, 4, CPU)
    memory.matrix.fill_(7)
    shown = memory.matrix[:, 1:2]
    memory.free()
    assert spare.nbytes == 0
    assert MaskMemory(3, 4, CPU).matrix.data_ptr() != shown.data_ptr() - 4
    assert (shown == 7).all()


def test_memory_for_masks_is_kept_within_bounds_and_until_a_session_closes(
    spare: SpareMemory, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_memory, "MOST_BYTES", 1000)
    several = [MaskMemory(3, 4, CPU) for _ in range(20)]
    each = len(several[0]._map or b"")
    for memory in several:
        memory.free()
    assert 0 < spare.nbytes == 1000 // each * each
    bench().stock.close()
    assert spare.nbytes == 0


@forks
@forks_with_threads
def test_a_forked_process_keeps_no_memory_of_its_parent(spare: SpareMemory) -> None:
    MaskMemory(3, 4, CPU).free()
    with spare._lock:
        assert in_a_fork(lambda: spare.nbytes, lambda: MaskMemory(3, 4, CPU).intact) == ["0", "True"]


def test_threads_get_masks_of_their_own(bench: Callable[..., Bench]) -> None:
    made = bench()

    def many() -> torch.Tensor:
        return torch.cat([read(made.stock.take("a", 3)) for _ in range(100)], dim=1)

    outcomes = [each.result() for each in at_once(*[many] * 4)]
    seen = torch.cat([each for each in outcomes if isinstance(each, torch.Tensor)], dim=1)
    assert torch.unique(seen, dim=1).shape[1] == seen.shape[1] == 1200


def test_banks_shrink_with_their_memory() -> None:
    small = Halves(random_codes(64, 64))
    assert small.client._columns(1) == 256
    assert Halves(random_codes(64, 64), banks="0").client._columns(1) == 0
    for memory, columns in ((4 * 4 * 64 * 100, 64), (1, 32)):
        small.client._mask_bytes = memory
        small.client._bank_columns.clear()
        assert small.client._columns(1) == columns


@pytest.mark.parametrize("options", [{}, {"ahead": "1"}, {"banks": "0"}])
def test_few_tokens_decrypt_across_banks(options: dict[str, str]) -> None:
    halves = Halves(random_codes(19, 33), None, 64, **options)
    generator = torch.Generator().manual_seed(0)
    try:
        for tokens in (1, 100, 3, 128, 1, 127, 90, 90, 1):
            x = torch.randn(tokens, 33, generator=generator)
            assert error_of(halves.product(x), halves.exact(x)) < 2**-8
    finally:
        halves.client.close()


def test_a_closed_client_neither_encrypts_nor_decrypts() -> None:
    halves = Halves(random_codes(8, 16))
    sent = halves.client.encrypt(torch.ones(2, 16), halves.maps["forward"])
    reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), "forward", sent.buffers)
    halves.client.close()
    with pytest.raises(SecurityError, match="closed"):
        halves.client.encrypt(torch.ones(2, 16), halves.maps["forward"])
    with pytest.raises(SecurityError, match="closed"):
        halves.client.decrypt(reply, sent.state, halves.maps["forward"])


def test_a_bank_has_the_masks_of_its_block_token_by_token() -> None:
    block = Block(6, 4, 8, CPU)
    block.body.matrix.random_()
    block.hint.matrix.random_()
    body, hint, first = block.body.matrix.clone(), block.hint.matrix.clone(), block.body
    bank = block.by_tokens()
    assert torch.equal(bank.body.matrix, body)
    assert torch.equal(bank.hint.matrix, hint)
    assert bank.body.matrix[:, 3].is_contiguous()
    assert not first.intact, "what it was copied from is forgotten"
    bank.body.overwrite(slice(2, 5))
    assert not torch.equal(bank.body.matrix[:, 2:5], body[:, 2:5])
    assert torch.equal(bank.body.matrix[:, 5:], body[:, 5:])
    first.spoil()
    with pytest.raises(SecurityError):
        first.by_columns()
