"""Messages survive their wire form; whatever a peer sends instead is a ``ProtocolError`` that costs little memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from ciphertune.errors import ProtocolError
from ciphertune.protocol import KINDS, OLDEST_VERSION, VERSION, Limits, Message, error_message, pack, unpack

DTYPES = {
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f4": torch.float32,
    "f8": torch.float64,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensors(draw: Any) -> Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 1000))
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    return tensor.mT if draw(st.booleans()) and tensor.dim() >= 2 else tensor


MESSAGES = st.builds(
    Message,
    st.sampled_from(KINDS),
    st.dictionaries(TEXT, PLAIN, max_size=4),
    st.dictionaries(TEXT, tensors(), max_size=4),
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@given(MESSAGES)
def test_round_trip(message: Message) -> None:
    frames = pack(message)
    copy = unpack([bytes(frame) for frame in frames])
    assert (copy.kind, copy.fields) == (message.kind, message.fields)
    assert list(copy.buffers) == list(message.buffers)
    for name, tensor in message.buffers.items():
        assert same_bits(copy.buffers[name], tensor), name
    assert copy.nbytes == message.nbytes == sum(len(frame) for frame in frames[1:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).to(dtype).reshape(shape)
    assert same_bits(unpack(pack(Message("ok", {}, {"x": tensor}))).buffers["x"], tensor)


def test_frames_are_not_copied() -> None:
    tensor = torch.arange(6.0)
    frames = pack(Message("ok", {}, {"x": tensor}))
    assert unpack(frames).buffers["x"].data_ptr() == tensor.data_ptr()


def test_wire_form_is_little_endian_and_row_major() -> None:
    header, frame = pack(Message("ok", {"a": 1}, {"x": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).t()}))
    assert bytes(frame) == bytes([1, 0, 3, 0, 2, 0, 4, 0])
    assert msgpack.unpackb(header) == {"v": 1, "kind": "ok", "fields": {"a": 1}, "buffers": [["x", "i2", [2, 2]]]}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.complex64])
def test_dtypes_that_are_not_carried(dtype: torch.dtype) -> None:
    with pytest.raises(ProtocolError, match="'x' has dtype"):
        pack(Message("ok", {}, {"x": torch.zeros(2, dtype=dtype)}))


def test_text_form_shows_no_data() -> None:
    message = Message("ok", {"secret": 12345}, {"x": torch.full((2,), 54321.0)})
    assert repr(message) == "Message('ok', fields=['secret'], buffers={'x': ('float32', (2,))})"
    assert error_message("quota", "too much").fields == {"code": "quota", "message": "too much"}


def header(**changes: Any) -> dict[str, Any]:
    return {"v": VERSION, "kind": "ok", "fields": {}, "buffers": [["x", "f4", [2, 3]]], **changes}


def rejected(*frames: Any, limits: Limits | None = None, peak: int = 1 << 20) -> str:
    """The error that unpacking raises, after checking that it allocated no more than ``peak`` bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            unpack(frames) if limits is None else unpack(frames, limits)
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    return str(caught.value)


def test_the_base_of_the_rejection_tests_is_good() -> None:
    assert unpack([msgpack.packb(header()), bytes(24)]).buffers["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *[({"v": v}, "version") for v in (VERSION + 1, OLDEST_VERSION - 1, -1, 2**63, "1", 1.0, True, None, [1])],
        *[({"kind": kind}, "kind") for kind in ("OK", "", None, 3, ["ok"], {"ok": 1}, b"ok")],
        *[({"fields": fields}, "fields") for fields in (None, [], "a", 3)],
        *[({"buffers": buffers}, "describe") for buffers in (None, {}, "x", 3, [], [["x", "f4", [2, 3]]] * 2)],
        *[({"buffers": [row]}, "malformed") for row in (None, "x", [], ["x", "f4"], ["x", "f4", [2, 3], 1])],
        *[({"buffers": [[name, "f4", [2, 3]]]}, "malformed") for name in (None, 1, b"x", ["x"])],
        *[({"buffers": [["x", code, [2, 3]]]}, "dtype") for code in ("f2", "O", "", None, 4, b"f4", ["f4"])],
        *[({"buffers": [["x", "f4", shape]]}, "malformed") for shape in (None, 6, "23", {"0": 2}, [2, 3] + [1] * 7)],
        *[({"buffers": [["x", "f4", shape]]}, "malformed shape") for shape in ([-2, -3], [6, -1], [-6], [True, 6])],
        *[({"buffers": [["x", "f4", shape]]}, "malformed shape") for shape in ([2.0, 3], ["2", 3], [None], [[6]])],
        *[({"buffers": [["x", "f4", shape]]}, "announced") for shape in ([2, 2], [7], [], [0], [2, 3, 0])],
        ({"buffers": [["x", "f8", [2, 3]]]}, "announced"),
        # Products that wrap around 64 bits to the right size, and sizes that hide behind a dimension of 0.
        *[({"buffers": [["x", "f4", shape]]}, "limit") for shape in ([2**62, 2], [2**63, 6], [2**32, 2**32, 6])],
        *[({"buffers": [["x", "f4", shape]]}, "limit") for shape in ([0, 2**63], [2**64 - 1, 0], [2**40, 0, 2**40])],
    ],
)
def test_changed_headers(changes: dict[str, Any], text: str) -> None:
    assert text in rejected(msgpack.packb(header(**changes)), bytes(24))


def test_sizes_behind_a_zero_dimension_with_no_bytes_at_all() -> None:
    for shape in ([0, 2**63], [2**64 - 1, 0], [2**40, 0, 2**40], [2**31, 0]):
        assert "limit" in rejected(msgpack.packb(header(buffers=[["x", "f4", shape]])), b"")


@pytest.mark.parametrize("missing", ["v", "kind", "fields", "buffers"])
def test_missing_header_entries(missing: str) -> None:
    incomplete = header()
    del incomplete[missing]
    rejected(msgpack.packb(incomplete), bytes(24))


@pytest.mark.parametrize("value", [None, 1, "text", [1, 2], [["v", 1]], b"", 1.5])
def test_headers_that_are_no_map(value: Any) -> None:
    assert "not a map" in rejected(msgpack.packb(value))


def test_truncated_and_extended_frames() -> None:
    good = msgpack.packb(header())
    assert "no header" in rejected()
    for cut in range(len(good)):
        rejected(good[:cut], bytes(24))
    rejected(good + b"\0", bytes(24))
    rejected(good, bytes(23))
    rejected(good, bytes(25))
    rejected(good)
    rejected(good, bytes(24), bytes(24))


def test_a_buffer_named_twice() -> None:
    rows = [["x", "f4", [2, 3]], ["x", "f4", [2, 3]]]
    assert "twice" in rejected(msgpack.packb(header(buffers=rows)), bytes(24), bytes(24))


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(header_bytes=20), "header"),
        (Limits(buffers=1), "limit of 1"),
        (Limits(buffer_bytes=23), "limit of 23"),
        (Limits(total_bytes=47), "limit of 47"),
        (Limits(header_items=2), "msgpack"),
    ],
)
def test_limits(limits: Limits, text: str) -> None:
    frames = msgpack.packb(header(buffers=[["x", "f4", [2, 3]], ["y", "f4", [2, 3]]])), bytes(24), bytes(24)
    assert len(unpack(frames, Limits(buffers=2, buffer_bytes=24, total_bytes=48)).buffers) == 2
    assert text in rejected(*frames, limits=limits)


def test_limit_of_list_entries() -> None:
    fields = {"groups": [["q"]] * 6}
    frame = msgpack.packb(header(fields=fields, buffers=[]))
    assert unpack([frame], Limits(header_items=6)).fields == fields
    rejected(frame, limits=Limits(header_items=5))


def test_oversized_header_is_refused_before_it_is_read() -> None:
    assert "header" in rejected(memoryview(bytes(Limits().header_bytes + 1)))


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1v", b"\x81\xa6fields", b"\x92\xc0"])
@pytest.mark.parametrize("depth", [400, 2000, 100_000])
def test_depth_bombs(opener: bytes, depth: int) -> None:
    rejected(opener * depth + b"\xc0", peak=16 << 20)
    rejected(msgpack.packb(header())[:-1] + opener * depth, peak=16 << 20)


@pytest.mark.parametrize("opener", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
@pytest.mark.parametrize("size", [2**15, 2**20, 2**32 - 1])
def test_announced_sizes_allocate_nothing(opener: bytes, size: int) -> None:
    rejected(opener + size.to_bytes(4, "big"))
    rejected((opener + size.to_bytes(4, "big")) * 200, peak=64 << 20)


def test_a_full_header_of_nested_lists_costs_a_bounded_multiple() -> None:
    opener = b"\xdd" + (2**15).to_bytes(4, "big")
    bomb = opener * 500
    rejected(bomb + b"\xc0" * (Limits().header_bytes - len(bomb)), peak=160 << 20)


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_frames(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        unpack(frames)


@given(MESSAGES, st.data())
def test_damaged_frames(message: Message, data: Any) -> None:
    frames = [bytearray(frame) for frame in pack(message)]
    place = data.draw(st.integers(0, len(frames[0]) - 1))
    frames[0][place] ^= data.draw(st.integers(1, 255))
    try:
        changed = unpack(frames)
    except ProtocolError:
        return
    # What still reads is bounded by what came: a damaged header can rename, not invent data.
    assert changed.kind in KINDS
    assert changed.nbytes == message.nbytes


@given(st.dictionaries(st.sampled_from(["v", "kind", "fields", "buffers"]), PLAIN), st.binary(max_size=32))
def test_headers_of_anything(changes: dict[str, Any], frame: bytes) -> None:
    try:
        message = unpack([msgpack.packb(header(**changes)), frame])
    except ProtocolError:
        return
    assert message.nbytes == len(frame) == 24


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_frame_types(make: Callable[[bytes], Any]) -> None:
    message = unpack([make(msgpack.packb(header())), make(torch.arange(6.0).numpy().tobytes())])
    assert message.buffers["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
