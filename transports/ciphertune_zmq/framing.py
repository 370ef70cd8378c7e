"""Messages as ZeroMQ frames: an envelope, then the message's frames, large ones in chunks.

CURVE encrypts a frame as a whole, so one large frame is encrypted, sent and decrypted one after the other. With chunks
the three overlap: a reply of 10 MB takes half the time. Without CURVE there is no such gain, and joining chunks costs a
copy, so chunks are larger: just small enough that a slow link carries heartbeats between them.
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


def wrap(number: bytes, frames: Sequence[Frame], encrypted: bool) -> list[Frame]:
    """Make the envelope and the chunks that are sent.

    Args:
        number: 8 bytes that identify a request, and its reply, on a connection.
        frames: of the message.
        encrypted: whether CURVE encrypts them.
    """
    chunk = CHUNK if encrypted else PLAIN_CHUNK
    counts = []
    parts: list[Frame] = []
    for frame in frames:
        if len(frame) > chunk:
            view = memoryview(frame)
            chunks = [view[start : start + chunk] for start in range(0, len(view), chunk)]
            counts.append(len(chunks))
            parts += chunks
        else:
            counts.append(1)
            parts.append(frame)
    return [number + struct.pack(f"<{len(counts)}I", *counts), *parts]


def max_parts(limits: Limits) -> int:
    """The largest number of parts of a message within these limits, its envelope included."""
    return limits.buffers + 2 + limits.total_bytes // CHUNK + limits.buffers


def unwrap(envelope: bytes, parts: Sequence[Frame]) -> list[Frame]:
    """Join the chunks of a message to its frames.

    Raises:
        ProtocolError: the envelope does not describe the parts.
    """
    body = envelope[NUMBER_BYTES:]
    if len(body) % 4:
        raise ProtocolError("a message's envelope is malformed")
    counts = struct.unpack(f"<{len(body) // 4}I", body)
    if sum(counts) != len(parts) or 0 in counts:
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
