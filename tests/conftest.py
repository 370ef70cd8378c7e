"""What several test modules share: tiny models, a hook plugin that records, and plugins registered for one test."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiny as models
import torch
import warm
from farm import Farm
from hypothesis import settings
from torch import nn

from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.traffic import Exchange

pytest_plugins = ["ciphertune.testing.fixtures"]

# What tests keep on disk is not the user's.
_kept = tempfile.TemporaryDirectory(prefix="ciphertune-tests-", ignore_cleanup_errors=True)
for _name, _part in (("CIPHERTUNE_CACHE", "cache"), ("CIPHERTUNE_KEYS", "keys")):
    os.environ[_name] = str(Path(_kept.name) / _part)

# Run by hand (`make fuzz`, `make soak`), with packages that the tests do not install.
collect_ignore = ["long"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("ciphertune", deadline=None)
settings.load_profile("ciphertune")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """With several processes a module stays on one; slow tests go where there is room, first their groups."""
    if not hasattr(config, "workerinput"):
        return (yield)
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("slow", "xdist_group")])
    for item in items:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    yield
    if config.getoption("loadgroup", False):
        for item in items:
            if (group := item.get_closest_marker("xdist_group")) is not None:
                _keep_together(item, str(group.args[0]))
    return None


def _keep_together(item: pytest.Item, group: str) -> None:
    """xdist looks for the group at the end of the id. Its version 3.8 does not write it there since pytest 9.2."""
    if not item.nodeid.endswith(f"@{group}"):
        node: Any = item
        node._id = type(node.id).parse(f"{item.nodeid}@{group}")
    assert item.nodeid.endswith(f"@{group}")


@pytest.fixture
def farm(register: Any) -> Iterator[Farm]:
    """Hosts that hold parts of models, closed at the end."""
    found = Farm(register)
    yield found
    found.close()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what the test keeps between sessions."""
    monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def nobody_excluded() -> Iterator[None]:
    """Workers of other tests have the same names."""
    yield
    shutil.rmtree(Path(_kept.name) / "keys" / "excluded", ignore_errors=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported is left alone by later collections of garbage, each of which takes half a second otherwise."""
    gc.collect()
    gc.freeze()


_status = 0


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    global _status
    _status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A process that simulated a circuit of Concrete's ends with status 0 whatever Python says; failures would pass."""
    if "concrete.fhe" in sys.modules:
        _kept.cleanup()  # which nothing else does then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that the product starts by itself are forked: see ``helpers/warm.py``."""
    from ciphertune.worker import process

    known = {name: getattr(subprocess, name) for name in ("PIPE", "TimeoutExpired")}
    monkeypatch.setattr(process, "subprocess", types.SimpleNamespace(Popen=warm.popen, **known))


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once() -> Iterator[None]:
    """Of peft's model card, which is written with every adapter, and so with every checkpoint."""
    compile_template, found = jinja2.Environment.compile, {}

    def compiled(self: jinja2.Environment, source: Any, *rest: Any, **options: Any) -> Any:
        if not isinstance(source, str) or rest or options:
            return compile_template(self, source, *rest, **options)
        if (self, source) not in found:
            found[self, source] = compile_template(self, source)
        return found[self, source]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", compiled)
        yield


class Recorder:
    """A hook plugin that keeps what it is shown; hand its ``plugins`` to ``outsource``."""

    def __init__(self) -> None:
        self.asked: list[Exchange] = []
        self.answered: list[Exchange] = []
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.plugins = PluginManager()
        self.plugins.register(self, "recorder")

    @hookimpl
    def ciphertune_before_request(self, exchange: Exchange) -> None:
        self.asked.append(exchange)

    @hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        self.answered.append(exchange)

    @hookimpl
    def ciphertune_session_opened(self, session: Any) -> None:
        self.opened.append(session)

    @hookimpl
    def ciphertune_session_closed(self, session: Any) -> None:
        self.closed.append(session)

    def products(self, direction: str) -> list[tuple[str, ...]]:
        """The layers of each answered product of one direction, in order."""
        return [exchange.layers for exchange in self.answered if exchange.direction == direction]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, in background jobs too, which start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """The compiled loops of mlwe spread over two threads; torch keeps its one, whose threads spin while they wait."""
    from ciphertune_mlwe import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "thread_count", lambda: 2)
        yield


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def register(ciphertune_register: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """``register(group, plugin_class)``: install a backend or transport under its name, for this test."""
    return ciphertune_register


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], nn.Module]:
    """``tiny(kind)``: see ``model`` of ``helpers/tiny.py``."""
    return models.model


@pytest.fixture(scope="session")
def project_in() -> Callable[[Path], Path]:
    """``project_in(folder)``: puts a tiny Llama, a tokenizer of characters, a text and a configuration there."""
    return _make_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with them."""
    return _make_project(tmp_path)


def _make_project(folder: Path) -> Path:
    models.save_letters(folder / "model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    models.llama(**sizes, num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (folder / "run.toml").write_text(
        'to = "clear"\n[model]\nname = "model"\n[data]\nsource = "text.txt"\nlength = 16\nbatch_size = 8\n'
        '[training]\noutput = "out"\nsteps = 8\nlearning_rate = 0.02\nschedule = "cosine"\ncheckpoint_dir = "ck"\n'
        "checkpoint_every = 4\neval_every = 4\n"
    )
    return folder
