"""Messages as ZeroMQ frames: one of a small message; an envelope, frames and chunks of frames of a larger one.

A frame costs more than the copy of a few KB, for whoever sends it and for whoever receives it.

CURVE encrypts a frame as a whole, so one large frame is encrypted, sent and decrypted one after the other. With chunks
the three overlap: a reply of 10 MB takes half the time. Without CURVE there is no such gain, and joining chunks costs a
copy, so chunks are larger: just small enough that a slow link carries heartbeats between them.

An envelope is the request's number (8 bytes), the number of the message's frames (uint32), and a uint32 for each of
them: of a small message its size, and the frames follow in the same envelope, each at a multiple of ``ALIGNMENT``; else
how many of the parts that come after the envelope are its chunks. Integers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from ciphertune.errors import ProtocolError
from ciphertune.protocol import Frame, Limits

CHUNK = 1 << 19
"""Bytes of a chunk with CURVE; between 256 KiB and 1 MiB the gain is within a tenth of the best."""

PLAIN_CHUNK = 1 << 21
"""Bytes of a chunk without CURVE."""

MAX_FRAME = PLAIN_CHUNK + (1 << 12)
"""Bytes of a frame on the wire at most, what CURVE adds included. ZeroMQ takes no larger one."""

NUMBER_BYTES = 8

SMALL = 1 << 16
"""Bytes of an envelope, up to which it holds the message's frames themselves."""

ALIGNMENT = 16
"""Where the frames of a small message begin: tensors share their memory."""

_COUNT = struct.Struct("<I")


def wrap(number: bytes, frames: Sequence[Frame], encrypted: bool) -> list[Frame]:
    """Make the envelope and the chunks that are sent.

    Args:
        number: 8 bytes that identify a request, and its reply, on a connection.
        frames: of the message.
        encrypted: whether CURVE encrypts them.
    """
    sizes = list(map(len, frames))
    if sum(sizes) + (len(sizes) + 2) * ALIGNMENT <= SMALL:
        pieces: list[Frame] = [_envelope(number, sizes)]
        at = len(pieces[0])
        for size, frame in zip(sizes, frames, strict=True):
            pieces += (bytes(-at % ALIGNMENT), frame)
            at += -at % ALIGNMENT + size
        return [b"".join(pieces)]
    chunk = CHUNK if encrypted else PLAIN_CHUNK
    counts = []
    parts: list[Frame] = []
    for size, frame in zip(sizes, frames, strict=True):
        if size > chunk:
            view = memoryview(frame)
            chunks = [view[start : start + chunk] for start in range(0, size, chunk)]
            counts.append(len(chunks))
            parts += chunks
        else:
            counts.append(1)
            parts.append(frame)
    return [_envelope(number, counts), *parts]


def _envelope(number: bytes, numbers: Sequence[int]) -> bytes:
    return number + struct.pack(f"<{1 + len(numbers)}I", len(numbers), *numbers)


def max_parts(limits: Limits) -> int:
    """The largest number of parts of a message within these limits, its envelope included."""
    return limits.buffers + 2 + limits.total_bytes // CHUNK + limits.buffers


def unwrap(envelope: bytes, parts: Sequence[Frame]) -> list[Frame]:
    """The message's frames, chunks of one joined.

    Args:
        envelope: its memory is shared by the frames that it holds.
        parts: that came after it.

    Raises:
        ProtocolError: the envelope does not describe what came.
    """
    start = NUMBER_BYTES + _COUNT.size
    # The bound is on the number of frames too, before anything is made for each.
    if len(envelope) < start or (len(envelope) > SMALL and not parts):
        raise ProtocolError("a message's envelope is malformed")
    (count,) = _COUNT.unpack_from(envelope, NUMBER_BYTES)
    end = start + _COUNT.size * count
    if end > len(envelope):
        raise ProtocolError("a message's envelope is malformed")
    numbers = struct.unpack_from(f"<{count}I", envelope, start)
    return _chunked(numbers, parts, len(envelope) == end) if parts else _enclosed(numbers, envelope, end)


def _enclosed(sizes: Sequence[int], envelope: bytes, at: int) -> list[Frame]:
    """The frames in an envelope whose description ends at a byte."""
    view = memoryview(envelope)
    frames: list[Frame] = []
    for size in sizes:
        start = at + -at % ALIGNMENT
        at = start + size
        frames.append(view[start:at])
    if at != len(envelope):
        raise ProtocolError("a message's envelope does not describe the frames that came in it")
    return frames


def _chunked(counts: Sequence[int], parts: Sequence[Frame], ended: bool) -> list[Frame]:
    """The frames of which so many parts each are chunks; ``ended``: the envelope says no more."""
    if not ended or sum(counts) != len(parts) or 0 in counts:
        raise ProtocolError("a message's envelope does not describe the frames that came with it")
    frames: list[Frame] = []
    start = 0
    for count in counts:
        frames.append(parts[start] if count == 1 else _join(parts[start : start + count]))
        start += count
    return frames


def _join(parts: Sequence[Frame]) -> Frame:
    whole = np.empty(sum(len(part) for part in parts), dtype=np.uint8)
    start = 0
    for part in parts:
        whole[start : start + len(part)] = np.frombuffer(part, dtype=np.uint8)
        start += len(part)
    return whole.data
