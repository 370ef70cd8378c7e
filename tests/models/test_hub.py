"""Models that only a hub could have: asked for once, shortly, and without the name while nobody answers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ciphertune.bundle.writer import split
from ciphertune.errors import ConfigError
from ciphertune.models import hub
from ciphertune.models.known import skeleton
from ciphertune.models.load import known_labels, load_named_model, load_tokenizer
from ciphertune.models.names import published_name

OPENERS: dict[str, Callable[[str], Any]] = {
    "load_named_model": load_named_model,
    "whole": lambda name: load_named_model(name, whole=True),
    "load_tokenizer": load_tokenizer,
    "known_labels": known_labels,
    "skeleton": skeleton,
    "split": lambda name: split(name, Path("bundle")),
}


class Session:
    """In place of the hub's client."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers
        self.asked: list[tuple[str, float]] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append((url, timeout))
        if not self.answers:
            raise ConnectionError("no network")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    session = Session(answers=False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.hub_answers.cache_clear()
    yield session
    hub.hub_answers.cache_clear()


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["mymodel", "clinic/patients"])
def test_a_name_that_nothing_has(
    unreachable: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, opener: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"'{name}': there is no such folder.*the hub cannot be reached"):
            OPENERS[opener](name)
    # Once a process, briefly, and not by this name.
    assert unreachable.asked == [("https://huggingface.co", hub._SECONDS)]


@pytest.mark.parametrize("opener", OPENERS)
def test_paths_are_sent_nowhere(
    unreachable: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("patients.toml", "./patients", "a/b/c", "smolm2"):
        with pytest.raises(ConfigError, match="not looked for on a hub"):
            OPENERS[opener](name)
    assert unreachable.asked == []


def test_a_name_that_no_hub_takes(unreachable: Session) -> None:
    with pytest.raises(ConfigError, match="a hub has no names of this form"):
        load_named_model("my model")
    assert unreachable.asked == []


def test_a_hub_that_never_answers(unreachable: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking its address up can take longer than any limit that its client knows."""
    monkeypatch.setattr(hub, "_SECONDS", 0.1)
    monkeypatch.setattr(Session, "head", lambda *arguments, **options: time.sleep(5))
    with pytest.raises(ConfigError, match="cannot be reached"):
        load_named_model("mymodel")


def test_a_copy_is_used_where_the_hub_cannot_be_reached(
    unreachable: Session, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = project / "hub"
    entry = cache / "models--clinic--tiny"
    shutil.copytree(project / "model", entry / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
    assert skeleton("clinic/tiny").config.hidden_size == 32
    model, tokenizer = load_named_model("clinic/tiny")
    assert model.config.hidden_size == 32
    assert len(tokenizer) == 97
    assert known_labels("clinic/tiny") is None
    assert published_name(model.config._name_or_path) == "clinic/tiny"
    split("clinic/tiny", project / "bundle")
    assert len(unreachable.asked) == 1


def test_a_hub_that_answers_is_asked(unreachable: Session) -> None:
    unreachable.answers = True
    assert hub.found_at("clinic/tiny") == "clinic/tiny"
