"""Pseudorandom bytes and what is sampled from them: secrets and errors.

AES-256 in counter mode, keyed by 32 bytes from the operating system or derived from such.
"""

from __future__ import annotations

import hmac
import os

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch import Tensor

from ciphertune.errors import SecurityError

SEED_BYTES = 32
_BLOCK = 16
_ZEROS = np.zeros(1 << 18, dtype=np.uint8)

Bytes = npt.NDArray[np.uint8]


class Keystream:
    """The AES-256-CTR keystream of a key, from a block counter on.

    Args:
        key: 32 bytes.
        first_block: counter of the first 16-byte block.
        label: 8 bytes that set apart streams of one key.
    """

    def __init__(self, key: bytes, first_block: int = 0, label: bytes = bytes(8)) -> None:
        if len(key) != SEED_BYTES or len(label) != 8:
            raise ValueError("a keystream needs a 32-byte key and an 8-byte label")
        nonce = label + first_block.to_bytes(8, "big")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()

    def fill(self, out: Bytes, nbytes: int) -> Bytes:
        """Write the next nbytes into ``out``, which needs 15 bytes of room past them; return the filled part."""
        view = out.data
        for start in range(0, nbytes, len(_ZEROS)):
            size = min(len(_ZEROS), nbytes - start)
            self._encryptor.update_into(_ZEROS[:size].data, view[start : start + size + _BLOCK - 1])
        return out[:nbytes]


def room(nbytes: int) -> int:
    """Size of a buffer that ``Keystream.fill`` can write nbytes into."""
    return nbytes + _BLOCK - 1


def ternary(key: bytes, count: int) -> npt.NDArray[np.int8]:
    """``count`` values uniform in {-1, 0, 1} of a key used once, in time that does not depend on them.

    Each is ⌊3u / 2⁶⁴⌋ − 1 of 64 pseudorandom bits u: the bias is below 2⁻⁶².
    """
    stream = Keystream(key, label=b"secrets ")
    words = stream.fill(np.empty(room(8 * count), dtype=np.uint8), 8 * count).view("<u8")
    low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    # In place, so that nothing that tells of them is left in memory that nobody overwrites.
    low *= np.uint64(3)
    low >>= np.uint64(32)
    high *= np.uint64(3)
    high += low
    high >>= np.uint64(32)
    values = high.astype(np.int8)
    values -= np.int8(1)
    for each in (words, low, high):
        each.fill(0)
    return values


def fresh_seed() -> bytes:
    """32 bytes from the operating system. Raises ``SecurityError`` where it cannot give any: a seed is never reused."""
    try:
        return os.urandom(SEED_BYTES)
    except NotImplementedError as error:
        raise SecurityError("the operating system gives no randomness; nothing can be encrypted safely") from error


_PROCESS_KEY = os.urandom(SEED_BYTES)
_HASH_KEY = os.urandom(SEED_BYTES)


def message_hash(message: Bytes) -> bytes:
    """16 bytes that bind ``hedged_seed`` to a message, and are used for nothing else.

    Poly1305 under a key of this process (Bernstein, "The Poly1305-AES message-authentication code", FSE 2005), as a
    universal hash: two messages of up to L bytes have the same with probability 8 ⌈L/16⌉ / 2^106 at most, over the key,
    on which no message depends since nobody sees a hash. It takes a seventh of SHA-256's time.
    """
    hashing = Poly1305(_HASH_KEY)
    hashing.update(message.data)
    return hashing.finalize()


def hedged_seed(label: bytes, message: bytes) -> bytes:
    """32 bytes from the operating system, bound to what is encrypted: for secrets that are drawn after the message.

    HMAC-SHA-256 under a key of this process, of a label, fresh random bytes and a hash of the message (hedging as in
    Bellare et al., "Hedged public-key encryption", ASIACRYPT 2009, and Ristenpart and Yilek, NDSS 2010, for cloned
    machines). Two copies of a machine whose generators give the same bytes then use one seed for one message only.

    Args:
        label: sets apart seeds that are drawn for one message.
        message: a hash of it; empty where it is not known yet.

    Raises:
        SecurityError: the operating system gives no randomness.
    """
    return hmac.digest(_PROCESS_KEY, label + b"\0" + fresh_seed() + message, "sha256")


def expand(key: bytes, first_row: int, rows: int, row_bytes: int, out: Bytes) -> Bytes:
    """Rows of a keystream, each ``row_bytes`` long (a multiple of 16), from ``first_row`` on; ``out`` needs room.

    Rows can be made in any order and on any thread, since the counter of a row's first block is known.
    """
    return Keystream(key, first_row * (row_bytes // _BLOCK)).fill(out, rows * row_bytes)


def centred_binomial(noise: Tensor, tokens: int) -> Tensor:
    """Errors from random bytes: the number of ones among 42 bits, less 21; variance 10.5, standard deviation 3.24.

    The same operations for every value, and the same integers on every machine (Alkim et al., "Post-quantum key
    exchange: a new hope", 2016, for the distribution).

    Args:
        noise: (rows, 6 · tokens or more) uint8: per row the 32-bit words, then the 16-bit words.
        tokens: errors a row.

    Returns:
        (rows, tokens) int32.
    """
    words = noise[:, : 4 * tokens].contiguous().view(torch.int32)
    halves = noise[:, 4 * tokens : 6 * tokens].contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0x3FF)
    return _ones(words).add_(_ones(halves)).sub_(21)


def _ones(words: Tensor) -> Tensor:
    """Number of ones in every int32 (Warren, "Hacker's Delight", 5-1); arithmetic shifts are masked to be logical."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return octets.mul_(0x01010101).bitwise_right_shift_(24)
