"""Messages and their wire form: nothing a peer sends may do more than raise ProtocolError."""

from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.errors import ProtocolError
from ciphertune.protocol import _DTYPES, Limits, Message, pack, unpack

FIELDS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(FIELDS, st.dictionaries(st.text(max_size=6), st.tuples(st.sampled_from(sorted(_DTYPES)), SHAPES), max_size=4))
def test_messages_survive_the_wire(fields: dict[str, Any], described: dict[str, tuple[str, list[int]]]) -> None:
    buffers = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(_DTYPES[code])
        for name, (code, shape) in described.items()
    }
    frames = pack(Message("evaluate", fields, buffers))
    back = unpack([bytes(frame) for frame in frames])
    assert (back.kind, back.fields) == ("evaluate", fields)
    assert list(back.buffers) == list(buffers)
    for name, tensor in buffers.items():
        assert back.buffers[name].dtype == tensor.dtype
        assert torch.equal(back.buffers[name], tensor)


def test_contiguous_buffers_are_not_copied() -> None:
    tensor = torch.zeros(1000, dtype=torch.int8)
    frame = pack(Message("ok", {}, {"x": tensor}))[1]
    tensor[7] = 5
    assert frame[7] == 5
    received = unpack(pack(Message("ok", {}, {"x": tensor}))).buffers["x"]
    tensor[8] = 6
    assert received[8] == 6


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_frames(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        unpack(frames)


@settings(max_examples=300)
@given(st.data())
def test_changed_frames_are_refused_or_still_a_message(data: st.DataObject) -> None:
    frames = [bytearray(f) for f in pack(Message("ok", {"a": [1, "b"]}, {"x": torch.arange(6, dtype=torch.int16)}))]
    index = data.draw(st.integers(0, 1))
    for _ in range(data.draw(st.integers(1, 4))):
        if frames[index]:
            frames[index][data.draw(st.integers(0, len(frames[index]) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frames[index])))
    frames[index] = frames[index][:cut]
    try:
        message = unpack(frames)
    except ProtocolError:
        return
    assert sum(t.numel() * t.element_size() for t in message.buffers.values()) <= sum(len(f) for f in frames)


def header(**changes: Any) -> bytes:
    content = {"v": 1, "kind": "ok", "fields": {}, "buffers": [["x", "i1", [4]]]}
    packed: bytes = msgpack.packb({**content, **changes})
    return packed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": 0}, "version"),
        ({"v": 2}, "version"),
        ({"v": True}, "version"),
        ({"v": "1"}, "version"),
        ({"kind": "exec"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"fields": []}, "fields"),
        ({"buffers": None}, "buffers"),
        ({"buffers": []}, "buffers"),
        ({"buffers": [["x", "O", [4]]]}, "dtype"),
        ({"buffers": [["x", ["i1"], [4]]]}, "dtype"),
        ({"buffers": [[1, "i1", [4]]]}, "malformed"),
        ({"buffers": [["x", "i1"]]}, "malformed"),
        ({"buffers": [["x", "i1", [-4]]]}, "shape"),
        ({"buffers": [["x", "i1", [True, 4]]]}, "shape"),
        ({"buffers": [["x", "i1", [4.0]]]}, "shape"),
        ({"buffers": [["x", "i1", [1] * 9]]}, "shape"),
        ({"buffers": [["x", "i1", [2**40, 2**40]]]}, "over the limit"),
        ({"buffers": [["x", "i1", [5]]]}, "announced"),
        ({"buffers": [["x", "f8", [4]]]}, "announced"),
    ],
)
def test_headers_that_lie(changes: dict[str, Any], message: str) -> None:
    unpack([header(), bytes(4)])
    with pytest.raises(ProtocolError, match=message):
        unpack([header(**changes), bytes(4)])


def test_limits_come_before_memory() -> None:
    with pytest.raises(ProtocolError, match="header of"):
        unpack([header(), bytes(4)], Limits(header_bytes=8))
    with pytest.raises(ProtocolError, match="more than the limit of 3"):
        unpack([header(), bytes(4)], Limits(total_bytes=3))
    with pytest.raises(ProtocolError, match="over the limit of 3"):
        unpack([header(), bytes(4)], Limits(buffer_bytes=3))
    with pytest.raises(ProtocolError, match="buffers are more"):
        unpack([header(), bytes(4)], Limits(buffers=0))
    twice = header(buffers=[["x", "i1", [4]], ["x", "i1", [4]]])
    with pytest.raises(ProtocolError, match="twice"):
        unpack([twice, bytes(4), bytes(4)])
    with pytest.raises(ProtocolError):
        unpack([b"\x91" * 100_000])
    with pytest.raises(ProtocolError):
        unpack([b"\xdd\xff\xff\xff\xff"])


def test_dtypes_that_do_not_travel() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        pack(Message("ok", {}, {"x": torch.zeros(1, dtype=torch.complex64)}))


def test_a_repr_shows_shapes_and_no_values() -> None:
    shown = repr(Message("ok", {"secret": 123456}, {"x": torch.full((3,), 7.25)}))
    assert "(3,)" in shown
    assert "7.25" not in shown
    assert "123456" not in shown
