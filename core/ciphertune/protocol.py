"""Messages between client and worker, and their form on a wire.

A message is a kind, a few plain fields, and named buffers. On a wire it is one msgpack header followed by one raw
frame per buffer, little-endian and C-contiguous. Nothing is pickled. Everything a peer can influence is checked
against ``Limits`` before memory is allocated for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from ciphertune.errors import ProtocolError, VersionError

VERSION = 1
"""The newest version that this package speaks."""
OLDEST_VERSION = 1
"""The oldest one that it still speaks."""
HELLO_VERSION = 1
"""In which ``hello``, its reply and errors about versions are always written, so that any two ends can read them."""

KINDS = ("hello", "manifest", "weights", "open", "evaluate", "close", "stats", "ok", "error")
"""Of messages: the last two are replies."""
ERROR_CODES = (
    "protocol",
    "version",
    "unknown-session",
    "unknown-layer",
    "plugin",
    "quota",
    "busy",
    "holdings",
    "withheld",
    "internal",
)
"""``busy`` asks to try again later or elsewhere; ``holdings`` says that the worker no longer holds what the client
thinks it does; the others, but for ``unknown-session``, that the same request will fail again."""

_MOST_DIMENSIONS = 8
_DTYPES: dict[str, torch.dtype] = {
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f4": torch.float32,
    "f8": torch.float64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Frame = bytes | bytearray | memoryview
"""A part of a message on the wire. ``unpack`` makes tensors that share its memory, so give it bytes that stay as they
are."""

if sys.byteorder != "little":
    raise ImportError("CipherTune's wire format is little-endian; this machine is not")

with warnings.catch_warnings():
    # torch warns once a process that received frames are read-only; nobody writes to them.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what a peer may send.

    Attributes:
        header_bytes: size of the msgpack header.
        header_items: entries of any one list or map in the header.
        buffers: number of buffers in a message.
        buffer_bytes: size of one buffer.
        total_bytes: size of all buffers of a message.
    """

    header_bytes: int = 1 << 20
    header_items: int = 1 << 15
    buffers: int = 16
    buffer_bytes: int = 1 << 31
    total_bytes: int = 1 << 32


DEFAULT_LIMITS = Limits()
"""Those that hold where nobody says others. A client's link holds a reply to ``Message.reply_limits``."""


@dataclasses.dataclass
class Message:
    """One request or reply.

    Attributes:
        kind: one of ``KINDS``.
        fields: plain data: None, bool, int, float, str, bytes, lists and dicts with text keys.
        buffers: tensors by name.
        version: of the protocol, in which it is written; a reply is written in its request's.
        reply_bytes: of a request: bytes of buffers that its reply may have; None where they are not known. A link
            refuses a longer reply. It does not travel.
    """

    kind: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    version: int = HELLO_VERSION
    reply_bytes: int | None = dataclasses.field(default=None, compare=False)

    def __repr__(self) -> str:
        shapes = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in self.buffers.items()}
        return f"Message({self.kind!r}, fields={sorted(self.fields)}, buffers={shapes})"

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, without the header."""
        return sum(t.nbytes for t in self.buffers.values())

    @property
    def reply_limits(self) -> Limits:
        """What the reply to this request may be."""
        if self.reply_bytes is None:
            return DEFAULT_LIMITS
        return _limited(min(self.reply_bytes, DEFAULT_LIMITS.total_bytes))


@functools.lru_cache(maxsize=1024)
def _limited(nbytes: int) -> Limits:
    """Limits for a message with so many bytes of buffers."""
    return dataclasses.replace(DEFAULT_LIMITS, buffer_bytes=nbytes, total_bytes=nbytes)


def buffers_fault(buffers: object) -> str | None:
    """Why something cannot be the buffers of a message, as the end of a sentence; None where it can.

    Names and types alone are looked at, no value and no size.
    """
    if not isinstance(buffers, dict):
        return f"is a {type(buffers).__name__}, and must be a dict of tensors by name"
    for name, buffer in buffers.items():
        if not isinstance(name, str):
            return f"has a name that is a {type(name).__name__}, and must be a text"
        if not isinstance(buffer, Tensor):
            return f"has a {type(buffer).__name__} as {name!r}, and must have a tensor"
        if buffer.dtype not in _CODES:
            carried = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CODES)
            return f"has {name!r} of type {str(buffer.dtype).removeprefix('torch.')}; messages carry {carried}"
    return None


def spoken_versions() -> list[int]:
    """The oldest and the newest version of this package, as ``hello`` and its reply carry them in ``versions``."""
    return [OLDEST_VERSION, VERSION]


def agree(theirs: Any) -> int:
    """The newest version that both ends speak.

    Args:
        theirs: the other end's ``versions``, as it came.

    Raises:
        VersionError: there is none.
        ProtocolError: what came is no range of versions.
    """
    if not (isinstance(theirs, list) and len(theirs) == 2 and all(type(v) is int for v in theirs)):
        raise ProtocolError("the other end does not say which protocol versions it speaks")
    oldest, newest = int(theirs[0]), int(theirs[1])
    best = min(newest, VERSION)
    if best < max(oldest, OLDEST_VERSION):
        raise VersionError(
            f"the other end speaks protocol versions {oldest} to {newest}, and this one {OLDEST_VERSION} to {VERSION}: "
            f"upgrade CipherTune {'there' if newest < OLDEST_VERSION else 'here'}"
        )
    return best


def error_message(code: str, text: str) -> Message:
    """A reply that reports an error; ``code`` is one of ``ERROR_CODES``."""
    return Message("error", {"code": code, "message": text})


def pack(message: Message) -> list[Frame]:
    """The message as frames: the header, then one frame per buffer, without copying contiguous CPU buffers."""
    described = []
    frames: list[Frame] = []
    for name, tensor in message.buffers.items():
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise ProtocolError(f"buffer {name!r} has dtype {tensor.dtype}, which the protocol does not carry")
        described.append([name, code, list(tensor.shape)])
        values = np.ascontiguousarray(tensor.numpy(force=True))
        frames.append(values.data.cast("B") if values.size else b"")
    header = msgpack.packb(
        {"v": message.version, "kind": message.kind, "fields": message.fields, "buffers": described}, use_bin_type=True
    )
    return [header, *frames]


def unpack(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read frames from a peer into a message whose tensors share the frames' memory.

    Raises:
        ProtocolError: the frames are malformed, oversized, of an unknown version, or contradict their header.
    """
    if not frames:
        raise ProtocolError("an empty message has no header")
    header = _read_header(frames[0], limits)
    described = header.get("buffers")
    if not isinstance(described, list) or len(described) != len(frames) - 1:
        raise ProtocolError("the header does not describe the buffers that came with it")
    if len(described) > limits.buffers:
        raise ProtocolError(f"{len(described)} buffers are more than the limit of {limits.buffers}")
    total = sum(len(frame) for frame in frames[1:])
    if total > limits.total_bytes:
        raise ProtocolError(f"{total} bytes are more than the limit of {limits.total_bytes}")
    buffers: dict[str, Tensor] = {}
    for row, frame in zip(described, frames[1:], strict=True):
        name, tensor = _read_buffer(row, frame, limits)
        if name in buffers:
            raise ProtocolError(f"buffer {name!r} came twice")
        buffers[name] = tensor
    return Message(header["kind"], header["fields"], buffers, header["v"])


def _read_header(frame: Frame, limits: Limits) -> dict[str, Any]:
    if len(frame) > limits.header_bytes:
        raise ProtocolError(f"a header of {len(frame)} bytes is over the limit of {limits.header_bytes}")
    try:
        header = msgpack.unpackb(
            bytes(frame), raw=False, max_array_len=limits.header_items, max_map_len=limits.header_items
        )
    except Exception as error:
        raise ProtocolError(f"the header is not msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is not a map")
    version = header.get("v")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProtocolError("the header has no protocol version")
    kind = header.get("kind")
    # Whoever comes with another version must be able to ask which one to use, and to read that there is none.
    introduction = version == HELLO_VERSION and kind in ("hello", "ok", "error")
    if not introduction and not OLDEST_VERSION <= version <= VERSION:
        raise VersionError(f"protocol version {version} is not between {OLDEST_VERSION} and {VERSION}")
    if kind not in KINDS:
        raise ProtocolError("the message kind is unknown")
    if not isinstance(header.get("fields"), dict):
        raise ProtocolError("the header has no fields")
    return header


def _read_buffer(row: Any, frame: Frame, limits: Limits) -> tuple[str, Tensor]:
    if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[2], list)):
        raise ProtocolError("a buffer's description is malformed")
    name, code, shape = row
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ProtocolError("a buffer has an unknown dtype")
    if len(shape) > _MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise ProtocolError("a buffer has a malformed shape")
    expected = math.prod(shape) * dtype.itemsize
    # A dimension of 0 must not hide others that are too large for a tensor's strides.
    largest = expected or math.prod(max(n, 1) for n in shape) * dtype.itemsize
    if largest > limits.buffer_bytes:
        raise ProtocolError(f"a buffer of {largest} bytes is over the limit of {limits.buffer_bytes}")
    if expected != len(frame):
        raise ProtocolError(f"a buffer of {len(frame)} bytes was announced with {expected}")
    if expected == 0:
        return name, torch.empty(shape, dtype=dtype)
    # Its codes are numpy's. Torch's own functions take twice as long for a small one.
    return name, torch.from_numpy(np.ndarray(shape, code, frame))
