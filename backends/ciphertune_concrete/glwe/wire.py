"""Between the library's serialised objects and the numbers in them, which is all that travels.

Everything else in the library's bytes follows from the parameters and the shapes, so each side writes it anew: what
comes over a wire is only ever ciphertext values, any of which are valid, and never a length, shape or modulus that the
library would believe.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ciphertune.backend import Buffers
from ciphertune_concrete.glwe.library import other_layout
from ciphertune_concrete.glwe.params import (
    BASE_BITS,
    KEY_WORDS,
    LEVELS,
    REPLY_BITS,
    REQUEST_BITS,
    REQUEST_WORDS,
    SEED_WORDS,
    SIZE,
    input_blocks,
    reply_words,
)

Words = npt.NDArray[np.uint64]

# The modulus 2^64 of values before they are cut, as the library writes it: 0 in 128 bits, and the bits of a value.
_MODULUS = (0, 0, 64)
_HEAD = (REQUEST_WORDS,)
_MIDDLE = (REQUEST_BITS, SIZE, REQUEST_BITS, 1, SIZE)
_BLOCK = len(_HEAD) + REQUEST_WORDS + len(_MIDDLE) + SEED_WORDS + len(_MODULUS)
_KEY_TAIL = (BASE_BITS, LEVELS, 2, SIZE, *_MODULUS, SIZE, REPLY_BITS)


class _Request:
    """A request's bytes as words, and the places in them that vary."""

    def __init__(self, tokens: int, features: int) -> None:
        blocks = input_blocks(features)
        self.words: Words = np.zeros(1 + tokens * (2 + blocks * _BLOCK) + 2, dtype="<u8")
        self.words[0] = self.words[-2] = tokens
        self.words[-1] = features
        rows = self.words[1:-2].reshape(tokens, 2 + blocks * _BLOCK)
        rows[:, 0], rows[:, -1] = blocks, features
        each = rows[:, 1:-1].reshape(tokens, blocks, _BLOCK)
        each[..., 0] = REQUEST_WORDS
        stop = 1 + REQUEST_WORDS
        self.values = each[..., 1:stop]
        each[..., stop : stop + len(_MIDDLE)] = _MIDDLE
        stop += len(_MIDDLE)
        self.seeds = each[..., stop : stop + SEED_WORDS]
        each[..., stop + SEED_WORDS :] = _MODULUS


def request_bytes(values: Tensor, seeds: Tensor, features: int) -> bytes:
    """The library's bytes of an encrypted matrix.

    Args:
        values: (tokens, ciphertexts a token, 1248) int64, packed.
        seeds: (tokens, ciphertexts a token, 2) int64.
        features: of each token.
    """
    request = _Request(len(values), features)
    request.values[:] = _unsigned(values)
    request.seeds[:] = _unsigned(seeds)
    return request.words.tobytes()


def request_buffers(blob: bytes, tokens: int, features: int) -> Buffers:
    """The numbers in the library's bytes of an encrypted matrix: ``values`` and ``seeds`` as in ``request_bytes``.

    Raises:
        PluginError: the library lays them out otherwise.
    """
    expected = _Request(tokens, features)
    if len(blob) != expected.words.nbytes:
        raise other_layout()
    got = _Request(tokens, features)
    got.words[:] = np.frombuffer(blob, dtype="<u8")
    expected.values[:], expected.seeds[:] = got.values, got.seeds
    if not np.array_equal(expected.words, got.words):
        raise other_layout()
    return {"values": _signed(got.values), "seeds": _signed(got.seeds)}


def reply_bytes(values: Tensor, outputs: int) -> bytes:
    """The library's bytes of an encrypted result.

    Args:
        values: (tokens, words of all ciphertexts of a token) int64, packed.
        outputs: of each token.
    """
    words = _unsigned(values)
    columns: list[Words] = [_constant(words, len(reply_words(outputs)))]
    start = 0
    for index, count in enumerate(reply_words(outputs)):
        size = min(SIZE, outputs - index * SIZE)
        columns.append(_constant(words, count))
        columns.append(words[:, start : start + count])
        columns.append(_constant(words, *_reply_tail(size)))
        start += count
    return np.uint64(len(words)).tobytes() + np.concatenate(columns, axis=1).tobytes()


def reply_values(blob: bytes, tokens: int, outputs: int) -> Tensor:
    """The numbers in the library's bytes of an encrypted result, as in ``reply_bytes``.

    A ciphertext may carry more than the outputs asked for, as those from CUDA do; what is beyond them is left out.

    Raises:
        PluginError: the library lays them out otherwise.
    """
    if len(blob) % 8:
        raise other_layout()
    words = np.frombuffer(blob, dtype="<u8")
    counts = reply_words(outputs)
    found: Words = np.empty((tokens, sum(counts)), dtype=np.uint64)
    place = _take(words, 0, tokens)
    for row in found:
        place = _take(words, place, len(counts))
        start = 0
        for index, count in enumerate(counts):
            length = int(words[place]) if place < len(words) else 0
            tail = place + 1 + length
            held = int(words[tail + 4]) if length < len(words) and tail + 4 < len(words) else 0
            least = min(SIZE, outputs - index * SIZE)
            if not least <= held <= SIZE or [length] != reply_words(held):
                raise other_layout()
            row[start : start + count] = words[place + 1 : place + 1 + count]
            place = _take(words, tail, *_reply_tail(held))
            start += count
    if place != len(words):
        raise other_layout()
    return _signed(found)


def key_bytes(key: Tensor) -> bytes:
    """The library's bytes of a compression key, from its (KEY_WORDS,) int64."""
    values = _unsigned(key).data.cast("B")
    return b"".join((np.uint64(KEY_WORDS).tobytes(), values, np.array(_KEY_TAIL, dtype="<u8").tobytes()))


def key_values(blob: bytes) -> memoryview:
    """The part of a compression key's bytes that is not the same for all.

    Raises:
        PluginError: the library lays it out otherwise.
    """
    tail = np.array(_KEY_TAIL, dtype="<u8").tobytes()
    if len(blob) != 8 + 8 * KEY_WORDS + len(tail) or blob[:8] != np.uint64(KEY_WORDS).tobytes():
        raise other_layout()
    if blob[-len(tail) :] != tail:
        raise other_layout()
    return memoryview(blob)[8 : -len(tail)]


def _reply_tail(size: int) -> tuple[int, ...]:
    return (REPLY_BITS, SIZE + size, 1, SIZE, size, *_MODULUS)


def _constant(words: Words, *values: int) -> Words:
    return np.tile(np.array(values, dtype=np.uint64), (len(words), 1))


def _take(words: Words, place: int, *expected: int) -> int:
    """Return the place after these words, which must be here."""
    stop = place + len(expected)
    if words[place:stop].tolist() != list(expected):
        raise other_layout()
    return stop


def _unsigned(tensor: Tensor) -> Words:
    return tensor.detach().cpu().contiguous().numpy().view(np.uint64)


def _signed(words: Words) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))
