"""A pytest plugin for tests of plugins, and of programs that use CipherTune.

Ask for it in the ``conftest.py`` at the root of the tests: ``pytest_plugins = ["ciphertune.testing.fixtures"]``. It is
not loaded by itself, because whoever has CipherTune installed runs other tests too.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from ciphertune.testing import Faults, ServedWorker


@pytest.fixture
def ciphertune_register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """``ciphertune_register(group, plugin_class)``: install a backend or transport under its name, for this test.

    Groups are ``ciphertune.backends`` and ``ciphertune.transports``, as in ``pyproject.toml``.
    """
    from ciphertune.plugins import registry

    installed = registry.installed
    added: dict[str, dict[str, registry.Registered]] = {}

    def patched(group: str) -> dict[str, registry.Registered]:
        return {**installed(group), **added.get(group, {})}

    def add(group: str, plugin: Any) -> None:
        entry_point: Any = types.SimpleNamespace(load=lambda: plugin)
        row = registry.Registered(plugin.name, f"test:{plugin.__name__}", "test 1.0", entry_point)
        added.setdefault(group, {})[plugin.name] = row

    monkeypatch.setattr(registry, "installed", patched)
    return add


@pytest.fixture
def ciphertune_worker(tmp_path: Path) -> Iterator[Callable[..., ServedWorker]]:
    """``ciphertune_worker(model, transport="zmq", **options)``: a worker in a thread, closed when the test ends.

    See ``ciphertune.testing.ServedWorker``: its ``selection`` is what ``outsource`` takes.
    """
    from ciphertune.testing import ServedWorker

    with contextlib.ExitStack() as stack:

        def serve(model: nn.Module | Path, transport: str = "zmq", **options: Any) -> ServedWorker:
            return stack.enter_context(ServedWorker(model, transport, tmp_path, **options))

        yield serve


@pytest.fixture
def ciphertune_faults(ciphertune_register: Callable[[str, Any], None]) -> Iterator[Faults]:
    """A link that drops, delays, duplicates, corrupts and reorders on command; see ``ciphertune.testing.Faults``.

    ``ciphertune_faults.over("zmq")`` gives the transport's name for a selection string, ``faulty::zmq``; ``over()``
    alone is around the worker in this process.
    """
    from ciphertune.testing import Faults

    faults = Faults(ciphertune_register)
    yield faults
    faults.heal()


@pytest.fixture(scope="session")
def ciphertune_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with random weights, split: a folder with ``client`` and ``worker``.

    Two layers, hidden size 16, vocabulary 48, at most 16 positions. Needs ``ciphertune[hf]``.
    """
    transformers = pytest.importorskip("transformers", reason='a bundle needs pip install "ciphertune[hf]"')
    import torch

    from ciphertune import split

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=48,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=16,
            )
        )
    folder = tmp_path_factory.mktemp("ciphertune") / "bundle"
    split(model, folder)
    return folder


@pytest.fixture
def ciphertune_simulated() -> Iterator[Callable[..., Any]]:
    """``ciphertune_simulated(model, **options)``: outsource to the simulation; sessions close when the test ends.

    The errors of ``mlwe`` from a seed, and none of its cost; ``of="NAME"`` for those of another backend. Gives back the
    model.
    """
    from urllib.parse import urlencode

    import ciphertune

    with contextlib.ExitStack() as stack:

        def simulate(model: Any, layers: Any = None, **options: Any) -> Any:
            query = urlencode(options)
            ciphertune.outsource(model, "simulation" + (f"?{query}" if query else ""), layers)
            stack.callback(ciphertune.session_of(model).close)
            return model

        yield simulate
