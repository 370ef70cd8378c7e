"""Clients and workers of different ages agree on a version of the protocol, or say what to upgrade."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import torch
from farm import Farm
from torch import nn

from ciphertune import protocol
from ciphertune.errors import ProtocolError, VersionError
from ciphertune.protocol import Message, agree, pack, unpack
from ciphertune.worker import Service, WeightStore, Worker


@pytest.fixture
def farm(register: Callable[[str, Any], None]) -> Iterator[Farm]:
    made = Farm(register)
    yield made
    made.close()


def speak(monkeypatch: pytest.MonkeyPatch, oldest: int, newest: int) -> None:
    monkeypatch.setattr(protocol, "OLDEST_VERSION", oldest)
    monkeypatch.setattr(protocol, "VERSION", newest)


@pytest.mark.parametrize(
    ("ours", "theirs", "best"),
    [((1, 1), [1, 1], 1), ((1, 3), [1, 2], 2), ((1, 2), [1, 3], 2), ((2, 3), [1, 2], 2), ((2, 4), [3, 9], 4)],
)
def test_the_newest_that_both_speak(
    monkeypatch: pytest.MonkeyPatch, ours: tuple[int, int], theirs: list[int], best: int
) -> None:
    speak(monkeypatch, *ours)
    assert agree(theirs) == best


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([4, 9], "versions 4 to 9, and this one 2 to 3: upgrade CipherTune here"),
        ([1, 1], "versions 1 to 1, and this one 2 to 3: upgrade CipherTune there"),
        (None, "does not say"),
        ([1], "does not say"),
        ([True, 2], "does not say"),
        (["1", "2"], "does not say"),
        ({"1": 2}, "does not say"),
    ],
)
def test_none_that_both_speak(monkeypatch: pytest.MonkeyPatch, theirs: Any, message: str) -> None:
    speak(monkeypatch, 2, 3)
    with pytest.raises(ProtocolError, match=message) as caught:
        agree(theirs)
    assert isinstance(caught.value, VersionError) == ("upgrade" in message)


def test_a_newer_client_speaks_as_its_older_worker_does(monkeypatch: pytest.MonkeyPatch, farm: Farm) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    expected = model(torch.ones(2, 4)).detach()
    (host,) = farm.plant(model, old=[["0"]])
    speak(monkeypatch, 1, 3)
    came: list[tuple[str, int, Any]] = []

    def older(request: Message) -> Message:
        came.append((request.kind, request.version, request.fields.get("versions")))
        reply = host.answer(request)
        if request.kind == "hello":
            reply.fields["versions"] = [1, 2]
        return reply

    host.script = older
    session = farm.outsource(model)
    torch.testing.assert_close(model(torch.ones(2, 4)).detach(), expected)
    session.close()
    assert came[0] == ("hello", 1, [1, 3])
    assert {kind: version for kind, version, _ in came[1:]} == {"manifest": 2, "open": 2, "evaluate": 2, "close": 2}


def test_a_worker_that_is_too_new_is_named(farm: Farm) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    (host,) = farm.plant(model, new=[["0"]])
    host.on("hello", lambda request: Message("ok", {"versions": [7, 9], "holdings": "x"}), always=True)
    with pytest.raises(VersionError, match="new: the other end speaks protocol versions 7 to 9.*upgrade CipherTune"):
        farm.outsource(model)
    assert isinstance(model[0], nn.Linear)
    assert model[0].weight.numel() == 12


def ask(service: Service, header: dict[str, Any]) -> dict[str, Any]:
    answered = threading.Event()
    answers: list[Any] = []

    def reply(frames: list[Any], release: Callable[[], None]) -> None:
        answers.append(msgpack.unpackb(bytes(frames[0])))
        release()
        answered.set()

    service.submit([msgpack.packb(header)], "client", reply)
    assert answered.wait(60)
    found: dict[str, Any] = answers[0]
    return found


def test_an_introduction_is_written_in_the_first_version_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dropped the first version still tells a client of that age which ones it speaks."""
    service = Service(Worker(WeightStore()))
    try:
        speak(monkeypatch, 4, 6)
        hello = ask(service, {"v": 1, "kind": "hello", "fields": {}, "buffers": []})
        assert (hello["v"], hello["kind"], hello["fields"]["versions"]) == (1, "ok", [4, 6])
        for version in (1, 3, 7):
            refused = ask(service, {"v": version, "kind": "stats", "fields": {}, "buffers": []})
            assert (refused["v"], refused["kind"], refused["fields"]["code"]) == (1, "error", "version")
            assert f"{version} is not between 4 and 6" in refused["fields"]["message"]
        answer = ask(service, {"v": 5, "kind": "stats", "fields": {}, "buffers": []})
        assert (answer["v"], answer["kind"]) == (5, "ok")
    finally:
        service.close()


def test_unknown_fields_are_passed_over() -> None:
    """A newer peer may say more than this one understands."""
    service = Service(Worker(WeightStore()))
    try:
        reply = ask(service, {"v": 1, "kind": "hello", "fields": {"mood": "good"}, "buffers": [], "extra": 1})
        assert reply["kind"] == "ok"
    finally:
        service.close()


def test_a_message_keeps_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    speak(monkeypatch, 1, 2)
    assert unpack(pack(Message("ok", {}, {}, 2))).version == 2
    assert unpack(pack(Message("ok"))).version == 1
