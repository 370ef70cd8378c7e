"""Workers that gave wrong answers are known again in later runs, until somebody takes that back."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from farm import Farm, Host, HostLink
from torch import nn

from ciphertune.cli import cli
from ciphertune.client.exclusions import Exclusion, Exclusions
from ciphertune.client.monitor import Watch
from ciphertune.errors import KeyFileError, ReplyError, SecurityError, WrongReplyError
from ciphertune.protocol import Message
from ciphertune.testing import ServedWorker

X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
WHOLE: Any = [["0"], ["2"]]


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Path:
    monkeypatch.setenv("CIPHERTUNE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


def model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 9))


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    return str(result.output)


def lying(host: Host) -> None:
    def lie(request: Message) -> Message:
        reply = host.answer(request)
        reply.buffers["y"] = reply.buffers["y"] ^ 1
        return reply

    host.on("evaluate", lie, always=True)


def caught(farm: Farm, host: Host) -> None:
    lying(host)
    outsourced = model()
    farm.outsource(outsourced, "mlwe")
    with pytest.raises(WrongReplyError):
        outsourced(X)


def test_a_liar_is_refused_in_the_next_run_until_that_is_taken_back(farm: Farm, keys: Path) -> None:
    (one,) = farm.plant(model(), "mlwe", one=WHOLE)
    caught(farm, one)
    (file,) = (keys / "excluded").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    asked = len(one.seen)
    with pytest.raises(SecurityError) as refused:
        farm.outsource(model(), "mlwe")
    assert len(one.seen) == asked, "it is not even greeted"
    (row,) = json.loads(invoke("excluded", "--json"))
    text = str(refused.value)
    assert f"one: it is excluded since {row['when'][:10]}" in text
    assert "it gave a wrong answer for 0 (forward)" in text
    assert f"'ciphertune excluded --lift {row['name']}' takes it back" in text
    assert "No worker is excluded" in invoke("excluded", "--lift", row["name"])
    one.script = one.answer
    outsourced = model()
    farm.outsource(outsourced, "mlwe")
    outsourced(X)


def test_a_replica_does_without_it(farm: Farm) -> None:
    one, two = farm.plant(model(), "mlwe", one=WHOLE, two=WHOLE)
    lying(one)
    outsourced = model()
    session = farm.outsource(outsourced, "mlwe")
    outsourced(X)
    assert [each.worker for each in session.pool.wrong] == ["one"]
    assert session.pool.wrong[0].why.startswith("it gave a wrong answer for ")
    before = len(one.seen)
    outsourced = model()
    session = farm.outsource(outsourced, "mlwe")
    outsourced(X)
    assert len(one.seen) == before
    assert two.count("evaluate") >= 2
    assert session.pool.wrong == [], "of this session"


def test_without_an_identity_another_model_at_the_address_is_not_meant(farm: Farm) -> None:
    (one,) = farm.plant(model(), "mlwe", one=WHOLE)
    caught(farm, one)
    (other,) = farm.plant(model(2), "mlwe", one=WHOLE)
    outsourced = model(2)
    farm.outsource(outsourced, "mlwe")
    outsourced(X)
    assert other.count("evaluate") == 2


def test_with_one_it_is_known_at_any_address(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostLink, "identity", "curve the-key", raising=False)
    one, two = farm.plant(model(), "mlwe", one=WHOLE, two=WHOLE)
    lying(one)
    lying(two)
    outsourced = model()
    farm.outsource(outsourced, "mlwe")
    with pytest.raises(WrongReplyError):
        outsourced(X)
    assert one.count("evaluate") + two.count("evaluate") == 1, "both are this worker"
    farm.sessions.pop().close()
    farm.hosts.clear()
    farm.plant(model(2), "mlwe", elsewhere=WHOLE)
    with pytest.raises(SecurityError, match="elsewhere: it is excluded"):
        farm.outsource(model(2), "mlwe")


def test_a_reply_of_the_wrong_form_counts_for_its_session_alone(farm: Farm, keys: Path) -> None:
    (one,) = farm.plant(model(), "mlwe", one=WHOLE)
    one.on("evaluate", lambda request: Message("ok", {}, {"y": torch.zeros(1, dtype=torch.uint8)}), always=True)
    outsourced = model()
    farm.outsource(outsourced, "mlwe")
    with pytest.raises(ReplyError):
        outsourced(X)
    assert not (keys / "excluded").exists()


def test_the_embedded_worker_is_not_excluded(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ciphertune
    from ciphertune.testing import LyingWorker
    from ciphertune_mlwe import MLWEBackend

    made = MLWEBackend.worker
    monkeypatch.setattr(MLWEBackend, "worker", staticmethod(lambda *args: LyingWorker(made(*args), "a bit flipped")))
    outsourced = ciphertune.outsource(model(), "mlwe", "all")
    with pytest.raises(WrongReplyError):
        outsourced(X)
    assert len(ciphertune.session_of(outsourced).pool.wrong) == 1
    ciphertune.session_of(outsourced).close()
    assert not (keys / "excluded").exists()


def test_a_curve_key_is_an_identity_and_top_tells(tmp_path: Path) -> None:
    pytest.importorskip("zmq")
    with ServedWorker(model(), "zmq", tmp_path / "served") as served:
        to = served.selection("mlwe")
        with Watch(to) as watch:
            (link,) = [worker.connection.link for worker in watch._workers]
            assert link.identity.startswith("curve ")
            assert len(link.identity) == len("curve ") + 40
            assert watch.look(20.0)[0].excluded == ""
            Exclusions().keep(Exclusion.now("elsewhere:1", link.identity, "", "it gave a wrong answer"))
            (state,) = watch.look(20.0)
            assert state.state == "up"
            assert "takes it back" in state.excluded
            assert "it is excluded since" in invoke("top", to, "--once").replace("\n", " ")


def test_a_file_that_was_changed_is_named(keys: Path) -> None:
    kept = Exclusions()
    kept.keep(Exclusion.now("one", "curve k", "", "it lied"))
    (file,) = (keys / "excluded").iterdir()
    text = file.read_text()
    for damaged in (text.replace("curve k", "curve j"), text.replace('"it lied"', "7"), "{}"):
        file.write_text(damaged)
        with pytest.raises(KeyFileError, match=file.name):
            kept.all()


def test_nothing_of_this_name() -> None:
    assert "No worker is excluded." in invoke("excluded")
    result = CliRunner().invoke(cli, ["excluded", "--lift", "x"])
    assert "no excluded worker has the name or address 'x'" in str(result.exception)


def test_where_it_cannot_be_kept_a_warning_says_so(
    keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CIPHERTUNE_KEYS", "/dev/null/keys")
    Exclusions().keep(Exclusion.now("one", "curve k", "", "it lied"))
    assert "ends with this session" in caplog.text
