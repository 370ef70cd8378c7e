"""What is left of secrets in memory, and what two copies of a machine draw."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlwe_halves import Halves

from ciphertune_mlwe import native, prg
from ciphertune_mlwe.prg import hedged_seed, message_hash


def test_the_compiler_leaves_the_wiping_in() -> None:
    """A memset before free is what compilers take out first."""
    library = Path(native.__file__).with_name(native.LIBRARY)
    if shutil.which("objdump") is None or native.library() is None:
        pytest.skip("needs objdump and the compiled loops")
    text = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    if "x86-64" not in text:
        pytest.skip("other processors' calls look otherwise")
    for name in ("ct_masks", "ct_hint_masks", "ct_transform_secrets"):
        bodies = re.findall(rf"^[0-9a-f]+ <{name}(?:\.(?:arch|default)[\w.]*)?>:\n(.*?)\n\n", text, re.M | re.S)
        worked = [body for body in bodies if len(body) > 2000]
        assert worked, name
        # A call, or stores of zeros of a string instruction.
        assert all(re.search(r"memset|rep stos", body) for body in worked), name


def test_secrets_are_the_same_as_ever() -> None:
    """Uniform in three values, from 64 bits each, and the intermediate numbers are overwritten."""
    values = prg.ternary(bytes(range(32)), 30000)
    counts = np.bincount(values + 1, minlength=3)
    assert counts.sum() == 30000
    assert all(abs(count - 10000) < 500 for count in counts)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both copies of a machine get the same bytes from the operating system."""
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))


def sent(x: torch.Tensor, **options: Any) -> torch.Tensor:
    codes = torch.ones(3, 40, dtype=torch.int8)
    halves = Halves(codes, hint_disk="0", check="0", **options)
    b: torch.Tensor = halves.client.encrypt(x, halves.maps["forward"]).buffers["b"]
    halves.client.close()
    return b[:, -1].to(torch.int16)  # the top byte of every value


def test_masks_made_after_the_message_differ_in_copies_of_a_machine(copied: None) -> None:
    """One seed would mask two messages; their difference would be the difference of what travels."""
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    again = sent(x, banks="0")
    assert torch.equal(sent(x, banks="0"), again), "the same message: the same ciphertext, which tells nothing new"
    other = x.clone()
    other[0, 0] += 1e-5
    changed = (sent(other, banks="0") != again).double().mean()
    assert changed > 0.95, "uniform: 255 of 256 bytes differ"


def test_seeds(copied: None) -> None:
    assert hedged_seed(b"secrets", b"one") == hedged_seed(b"secrets", b"one")
    assert len({hedged_seed(label, m) for label in (b"secrets", b"errors") for m in (b"", b"one", b"two")}) == 6


def test_hashes_bind_seeds_to_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test vector of RFC 8439, section 2.5.2."""
    key = "85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b"
    monkeypatch.setattr(prg, "_HASH_KEY", bytes.fromhex(key))
    message = np.frombuffer(b"Cryptographic Forum Research Group", dtype=np.uint8)
    assert message_hash(message).hex() == "a8061dc1305136c6c22b8baf0c0127a9"
    changed = message.copy()
    changed[-1] ^= 1
    assert message_hash(changed) != message_hash(message)


def test_fresh_bytes_count() -> None:
    assert hedged_seed(b"secrets", b"one") != hedged_seed(b"secrets", b"one")
