"""Frames as the body of a request or response: their number, their lengths, then the frames. Little-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from ciphertune.errors import ProtocolError
from ciphertune.protocol import Frame, Limits

PATH = "/ciphertune/v1"
TYPE = "application/vnd.ciphertune"
_CHUNK = 1 << 20


def most_bytes(limits: Limits) -> int:
    """The longest body that a message within these limits can have."""
    return 4 + 8 * (limits.buffers + 1) + limits.header_bytes + limits.total_bytes


def chunks(frames: Sequence[Frame]) -> Iterator[bytes]:
    """A body in chunks of at most 1 MiB."""
    yield struct.pack(f"<I{len(frames)}Q", len(frames), *(len(frame) for frame in frames))
    for frame in frames:
        view = memoryview(frame).cast("B")
        for start in range(0, len(view), _CHUNK):
            yield bytes(view[start : start + _CHUNK])


def length(frames: Sequence[Frame]) -> int:
    """Bytes of a body."""
    return 4 + 8 * len(frames) + sum(len(frame) for frame in frames)


def split(body: bytearray, limits: Limits) -> list[Frame]:
    """The frames of a body, sharing its memory.

    Raises:
        ProtocolError: it is not what ``chunks`` makes.
    """
    if len(body) < 4:
        raise ProtocolError("the body is cut short")
    (count,) = struct.unpack_from("<I", body)
    if not 1 <= count <= limits.buffers + 1 or len(body) < 4 + 8 * count:
        raise ProtocolError(f"a body of {len(body)} bytes cannot hold {count} frames")
    sizes = struct.unpack_from(f"<{count}Q", body, 4)
    start = 4 + 8 * count
    if start + sum(sizes) != len(body):
        raise ProtocolError("the lengths of frames do not add up to the body's")
    view, frames = memoryview(body).toreadonly(), []
    for size in sizes:
        frames.append(view[start : start + size])
        start += size
    return list(frames)
