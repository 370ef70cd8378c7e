"""Hints on disk: found again, read in pieces, and never believed."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mlwe_halves import CPU, Halves, error_of, random_codes
from torch import nn

import ciphertune
from ciphertune import cache
from ciphertune.backend import DIRECTIONS
from ciphertune.errors import CacheError, CipherTuneError
from ciphertune.key_files import keys_folder
from ciphertune_mlwe import MLWEBackend, hint_cache
from ciphertune_mlwe.client import MLWEClient
from ciphertune_mlwe.hint_store import HeldHints, StreamedHints

pytestmark = pytest.mark.usefixtures("two_threads")
MODEL = bytes(32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a client of its own; pieces of two packs, so that files have several."""
    monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CIPHERTUNE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setattr(hint_cache, "_CHUNK", 2 * 8 * 3 * 1280)
    return tmp_path / "cache" / hint_cache.PART


def client(model: bytes = MODEL, **options: str) -> MLWEClient:
    made: Any = MLWEBackend.from_text({"ahead": "0", **options}).client(CPU)
    made.begin(model, remote=False)
    return made  # type: ignore[no-any-return]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.hints"))


def check(halves: Halves) -> None:
    for direction in DIRECTIONS:
        for tokens in (1, 300):
            x = torch.randn(tokens, halves.maps[direction].in_features)
            assert error_of(halves.product(x, direction), halves.exact(x, direction)) < 2**-8.5


def kinds(halves: Halves) -> list[type]:
    return [type(halves.client._prepared[halves.maps[each].identity].hints) for each in DIRECTIONS]


@pytest.mark.parametrize("memory", ["1", "0"])
def test_a_later_session_finds_the_hints_and_asks_for_no_codes(folder: Path, memory: str) -> None:
    codes = random_codes(70, 100)
    first = Halves(codes, client(hint_memory=memory))
    check(first)
    assert len(files(folder)) == 2
    first.client.close()
    later = client(hint_memory=memory)
    assert later.preparation(first.maps["forward"], first.maps["backward"]) is None
    again = Halves(codes, later)
    check(again)
    # 70 and 100 rows take 0.28 and 0.4 MB.
    assert kinds(again) == ([HeldHints] * 2 if memory == "1" else [StreamedHints] * 2)


def test_memory_holds_what_fits_and_the_disk_the_rest(folder: Path) -> None:
    halves = Halves(random_codes(200, 250), client(hint_memory="1"))
    assert kinds(halves) == [HeldHints, StreamedHints], "0.77 MB and 0.98 MB"
    check(halves)


def test_other_models_clients_and_parameters_have_other_hints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = random_codes(9, 16)
    halves = Halves(codes, client())
    maps = halves.maps["forward"], halves.maps["backward"]
    assert client().preparation(*maps) is None
    assert client(b"\1" * 32).preparation(*maps) is not None
    assert client(request_bits="32").preparation(*maps) is not None
    monkeypatch.setenv("CIPHERTUNE_KEYS", str(tmp_path / "others"))
    assert client().preparation(*maps) is not None


def test_files_are_for_the_owner_alone(folder: Path) -> None:
    Halves(random_codes(9, 16), client())
    secret = keys_folder(None) / hint_cache.KEY_FILE
    for path in (*files(folder), secret):
        assert path.stat().st_mode & 0o777 == 0o600
    assert folder.glob("*").__next__().stat().st_mode & 0o777 == 0o700
    made = hint_cache.client_secret()
    assert made.mac_key.hex() not in repr(made)
    assert made == hint_cache.client_secret(), "once for all sessions"


def damage(path: Path, how: str, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    chunk = 16 + hint_cache._CHUNK
    if how == "cut":
        raw = raw[:-1]
    elif how == "longer":
        raw += b"\0"
    elif how == "bit":
        raw[len(raw) // 2] ^= 1
    elif how == "salt":
        raw[20] ^= 1
    elif how == "magic":
        raw[0] ^= 1
    elif how == "pieces exchanged":
        raw[32 : 32 + 2 * chunk] = raw[32 + chunk : 32 + 2 * chunk] + raw[32 : 32 + chunk]
    elif how == "another file":
        raw = bytearray(other.read_bytes())
    path.write_bytes(raw)


HARMS = ["cut", "longer", "bit", "salt", "magic", "pieces exchanged", "another file"]


@pytest.mark.parametrize("memory", ["8", "0"])
@pytest.mark.parametrize("how", HARMS)
def test_files_that_are_not_what_was_written_are_made_anew(folder: Path, how: str, memory: str) -> None:
    """Square, so that both directions' files are of one size."""
    codes = random_codes(80, 80)
    first = Halves(codes, client())
    first.client.close()
    one, other = files(folder)
    damage(one, how, other)
    later = client(hint_memory=memory)
    assert later.preparation(first.maps["forward"], first.maps["backward"]) is not None
    assert other.exists(), "what is whole is kept"
    check(Halves(codes, later))
    assert len(files(folder)) == 2
    assert client().preparation(first.maps["forward"], first.maps["backward"]) is None


@pytest.mark.parametrize("how", [*HARMS, "removed"])
def test_nothing_is_computed_with_hints_that_change_while_they_are_in_use(folder: Path, how: str) -> None:
    halves = Halves(random_codes(80, 80), client(hint_memory="0"))
    check(halves)
    one, other = files(folder)
    if how == "removed":
        one.unlink()
    else:
        damage(one, how, other)
    with pytest.raises(CacheError, match="make it anew"):
        check(halves)
    assert not one.exists()


def test_a_full_disk_is_told_before_codes_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves(random_codes(9, 16))
    maps = halves.maps["forward"], halves.maps["backward"]
    monkeypatch.setattr(cache, "free_bytes", lambda path: 1000)
    with pytest.raises(CacheError, match="0.1 MB.*no room"):
        client(hint_memory="0").preparation(*maps)
    with pytest.raises(CacheError, match="not kept on disk"):
        client(hint_memory="0", hint_disk="0").preparation(*maps)


def test_hints_that_fit_memory_need_no_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda path: 1000)
    halves = Halves(random_codes(9, 16), client())
    check(halves)
    assert not files(folder)
    monkeypatch.undo()
    monkeypatch.setenv("CIPHERTUNE_CACHE", "/dev/null/cache")
    check(Halves(random_codes(9, 16), client()))
    assert "hints are not kept on disk" in caplog.text


def test_a_disk_that_fills_up_while_hints_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hint_cache, "_write", full)
    check(Halves(random_codes(9, 16), client()))
    assert "No space left on device" in caplog.text
    with pytest.raises(CacheError, match=r"cannot be written.*more are to come"):
        Halves(random_codes(9, 16), client(hint_memory="0"))
    assert not list(folder.glob("*/*hints*")), "nothing half-written remains"


def test_the_models_that_were_not_used_for_longest_go_first(folder: Path) -> None:
    codes = random_codes(300, 200)
    for age, number in enumerate((3, 1, 2)):
        made = Halves(codes, client(bytes([number]) * 32, hint_disk="4"))
        made.client.close()
        for entry in cache.entries(hint_cache.PART):
            if entry.last_used > 1000:
                os.utime(entry.path / cache.IN_USE, (age, age))
    # Each takes 1.9 MB: two fit.
    assert [entry.last_used for entry in cache.entries(hint_cache.PART)] == [1, 2]
    used = client(bytes([1]) * 32)
    Halves(codes, client(bytes([4]) * 32, hint_disk="4"))
    assert len(cache.entries(hint_cache.PART)) == 2
    assert Halves(codes, used).client is used, "what is in use stays"


def test_what_is_in_use_is_not_removed(folder: Path) -> None:
    made = client()
    Halves(random_codes(9, 16), made)
    (entry,) = cache.entries(hint_cache.PART)
    assert not cache.remove(entry)
    made.close()
    assert cache.remove(entry)
    assert not cache.entries()


def test_a_killed_process_leaves_nothing_behind(folder: Path) -> None:
    one = client()
    (entry,) = cache.entries(hint_cache.PART)
    draft = entry.path / ".draft-x"
    draft.touch()
    two = client()
    assert draft.exists(), "the other may be writing it"
    one.close()
    two.close()
    client()
    assert not draft.exists()


def test_training_streams_what_does_not_fit_memory(folder: Path) -> None:
    """A tenth of the hints in memory; the losses are those of hints in memory, but for the errors' randomness."""

    def losses(memory: str) -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 64))
        first = nn.Linear(64, 64)
        model = nn.Sequential(first, net)
        ciphertune.outsource(model, layers=["1.*"], to=f"mlwe?hint_memory={memory}&weight_bits=8")
        optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
        x = torch.randn(32, 64)
        found = []
        for _ in range(3):
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        ciphertune.session_of(model).close()
        return found

    # Hints of 1,492 rows take 5.7 MB.
    streamed = losses("0")
    assert len(files(folder)) == 6
    assert streamed == pytest.approx(losses("100"), rel=1e-3)
    shutil.rmtree(folder)
    assert streamed == pytest.approx(losses("100"), rel=1e-3)


@pytest.mark.parametrize("option", ["hint_memory=-1", "hint_disk=-1", "hint_disk=x", "hint_memory=99999999999"])
def test_options_are_checked(option: str) -> None:
    name, value = option.split("=")
    with pytest.raises(CipherTuneError, match=name):
        MLWEBackend.from_text({name: value})
