"""A pad is used once: whatever threads, forks, copies and closed sessions do."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from ciphertune import SecurityError
from ciphertune.errors import NotPreparedError
from ciphertune_slalom import pads
from ciphertune_slalom.pads import Batch, Pad, PadStock, Seed, most_tokens

CPU = torch.device("cpu")


def same(body: Tensor) -> Tensor:
    return body


def stock(tokens: int = 64, batches: int = 1, features: int = 20) -> PadStock:
    made = PadStock(tokens)
    for _ in range(batches):
        made.add("product", Batch(features, 3, tokens // batches, CPU))
    return made


def test_pads_are_a_keystream_that_nobody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """ChaCha20 of a fresh key from block 0 on, whichever tokens are asked for, a token at the beginning of a block."""
    key = bytes(range(32))
    monkeypatch.setattr(Seed, "use", lambda self, use: use(key))
    batch = Batch(20, 3, 9, CPU)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(9 * 128))
    expected = torch.frombuffer(bytearray(stream), dtype=torch.int32).view(9, 32)[:, :20]
    assert torch.equal(batch.rows(0, 9), expected)
    assert torch.equal(batch.rows(4, 7), expected[4:7])


def test_no_two_pads_are_alike() -> None:
    first, second = (Batch(20, 3, 1000, CPU).rows(0, 1000) for _ in range(2))
    seen = {tuple(row) for row in torch.cat([first, second]).tolist()}
    assert len(seen) == 2000
    # Bits of 40,000 uniform words: means of a half, within six standard errors.
    words = torch.cat([first, second]).contiguous().view(torch.uint8).reshape(-1, 4)
    bits = torch.stack([words.bitwise_right_shift(place).bitwise_and(1) for place in range(8)])
    assert float((bits.double().mean(1) - 0.5).abs().max()) < 6 * 0.5 / 40_000**0.5


def test_a_pad_is_used_once() -> None:
    held = stock()
    pad = held.take("product", 5)
    used = pad.take(lambda body: body.clone())
    assert used.shape == (5, 20)
    for _ in range(2):
        with pytest.raises(SecurityError, match="used once"):
            pad.take(same)
    assert pad.products().shape == (5, 3), "answers may come more than once"
    other = held.take("product", 5).take(same)
    assert not torch.equal(used, other)


def test_a_pad_is_used_up_by_a_use_that_fails() -> None:
    pad = stock().take("product", 5)

    def fail(body: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        pad.take(fail)
    with pytest.raises(SecurityError, match="used once"):
        pad.take(same)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pad_cannot_be_copied(how: object) -> None:
    assert callable(how)
    with pytest.raises(SecurityError, match="cannot be copied"):
        how(stock().take("product", 5))


def test_threads_get_pads_of_their_own() -> None:
    """Each word of all pads that were taken is another, with batches that end within requests."""
    held = stock(tokens=600, batches=6)
    start = threading.Barrier(8)

    def some(_: int) -> list[Tensor]:
        start.wait()
        found = []
        for count in (7, 1, 19, 13, 30):
            pad = held.take("product", count)
            found.append(pad.take(lambda body: body.clone()))
        return found

    with ThreadPoolExecutor(8) as pool:
        taken = torch.cat([each for found in pool.map(some, range(8)) for each in found])
    assert len({tuple(row) for row in taken.tolist()}) == len(taken) == 560


def test_one_pad_used_by_threads_at_once() -> None:
    pad = stock().take("product", 5)
    start = threading.Barrier(8)

    def use(_: int) -> bool:
        start.wait()
        try:
            pad.take(same)
        except SecurityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(use, range(8))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("seems_the_same", [False, True])
def test_a_fork_uses_no_pads(seems_the_same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the stock nor those handed out, even where the process numbers are alike; the parent goes on."""
    held = stock()
    pad, batch = held.take("product", 5), Batch(20, 3, 8, CPU)
    if seems_the_same:
        number = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: number)
    with held._lock:  # by a thread that the fork does not have
        child = os.fork()
        if child == 0:
            status = 1
            try:
                refused = 0
                attempts = [lambda: pad.take(same), lambda: batch.rows(0, 1)]
                if not seems_the_same:
                    attempts.append(lambda: held.take("product", 1).take(same))
                for attempt in attempts:
                    try:
                        attempt()
                    except SecurityError:
                        refused += 1
                if not seems_the_same:
                    held.close()
                status = 0 if refused == len(attempts) else 2
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert pad.take(same).shape == (5, 20)
    assert held.take("product", 1).take(same).shape == (1, 20)


def test_too_few_pads_use_none_up() -> None:
    held = stock(tokens=64)
    assert held.missing("product") == 0
    held.take("product", 60)
    assert held.missing("product") == 60
    with pytest.raises(NotPreparedError, match="4 tokens, and 5"):
        held.take("product", 5)
    held.take("product", 4)
    with pytest.raises(NotPreparedError):
        held.take("product", 100)
    assert held.missing("product") == 100, "a product may have more tokens than a pass is for"
    held.add("product", Batch(20, 3, 100, CPU))
    assert held.take("product", 100).take(same).shape == (100, 20)
    assert held.missing("product") == 64, "for the next pass there is no reason to make so many"
    with pytest.raises(NotPreparedError):
        held.take("unknown", 1)


def test_seeds_are_overwritten_with_the_last_use() -> None:
    held = PadStock(10)
    batch = Batch(20, 3, 10, CPU)
    held.add("product", batch)
    first, second = held.take("product", 4), held.take("product", 6)
    first.take(same)
    assert any(batch._seed._memory[:])
    second.take(same)
    assert not any(batch._seed._memory[:])
    assert second.products().shape == (6, 3)


def test_closing_forgets_what_was_handed_out_too() -> None:
    held = stock()
    pad, used = held.take("product", 4), held.take("product", 4)
    used.take(same)
    held.close()
    held.close()
    for refused in (lambda: pad.take(same), used.products, lambda: held.take("product", 1)):
        with pytest.raises(SecurityError, match="closed session"):
            refused()
    late = Batch(20, 3, 4, CPU)
    held.add("product", late)
    with pytest.raises(SecurityError):
        late.rows(0, 1)


def test_a_keystream_is_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_tokens(20) == 1 << 31
    monkeypatch.setattr(pads, "_MOST_BLOCKS", 32)
    assert most_tokens(20) == 16
    with pytest.raises(ValueError, match="repeat"):
        Batch(20, 3, 17, CPU)


def test_nothing_shows() -> None:
    pad = stock().take("product", 2)
    assert "tensor(" not in repr(pad) + repr(Batch(2, 2, 2, CPU)) + repr(Seed()) + repr(stock())
    assert isinstance(pad, Pad)
