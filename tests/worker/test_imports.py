"""What an import loads: a worker's process has no use for a trainer, a client's session or keys."""

from __future__ import annotations

import json

import pytest
import warm

OPTIONAL = (
    *("transformers", "peft", "accelerate", "ray", "zmq", "rich", "mlflow", "tensorboardX", "prometheus_client"),
    *("matplotlib", "sklearn", "jinja2", "gguf"),
)
CLIENT_ROOMS = ("client", "training", "outsourcing", "interleaving", "runs", "planning", "workloads", "models", "cli")
CONTRACTS = ("ciphertune.linear", "ciphertune.backend", "ciphertune.transport")
WORKER = (
    *("ciphertune.worker", "ciphertune.worker.service", "ciphertune.worker.store", "ciphertune.bundle.worker"),
    *CONTRACTS,
)
# Our own modules that an import loads, packages included. Raise a number only for something that is needed there.
MOST = {
    ("ciphertune.linear",): 13,
    ("ciphertune.backend",): 9,
    ("ciphertune.transport",): 10,
    ("ciphertune.bundle.worker", "ciphertune.worker.service"): 43,
}
# Each half of mlwe, and what of the other it must not load.
HALVES = {
    ("ciphertune_mlwe.worker",): ("client", "masks", "mask_memory", "hints", "public", "transforms"),
    ("ciphertune_mlwe.client",): ("worker",),
}
IMPORT = """
import importlib, importlib.util, json, sys
import torch  # once for all

sets, optional = json.loads(sys.argv[1])
missing = [name for name in optional if importlib.util.find_spec(name) is None]
loaded = []
for names in sets:
    for name in [name for name in sys.modules if name.startswith("ciphertune")]:
        del sys.modules[name]
    for name in names:
        importlib.import_module(name)
    loaded.append(sorted(sys.modules))
print(json.dumps([missing, loaded]))
"""
CALL = """
import importlib, inspect, pkgutil, tempfile
import torch
import ciphertune

for module in pkgutil.walk_packages(ciphertune.__path__, "ciphertune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

names = ("outsource", "restore", "share", "split", "validate", "interleave")
assert all(name in ciphertune.__all__ for name in names)
replaced = [name for name in ciphertune.__all__ if inspect.ismodule(getattr(ciphertune, name))]
assert not replaced, replaced
assert all(callable(getattr(ciphertune, name)) for name in names)


def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


assert ciphertune.validate(model()) == {}
with tempfile.TemporaryDirectory() as folder:
    assert len(ciphertune.split(model(), folder + "/bundle", layers="all").workers) == 1
outsourced = ciphertune.outsource(model(), "clear", "all")
assert ciphertune.share(outsourced).layers == 2
assert ciphertune.interleave([lambda: outsourced(torch.ones(1, 4)).shape]) == [(1, 2)]
assert type(ciphertune.restore(outsourced)[0]) is torch.nn.Linear
print("called")
"""


def in_a_child(code: str, *arguments: str) -> str:
    done = warm.run(code, *arguments, preload=warm.TORCH)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def loaded() -> dict[tuple[str, ...], list[str]]:
    """All that is loaded once some modules are imported, in a process that imported torch and nothing else before."""
    sets = [WORKER, *MOST, *HALVES]
    missing, found = json.loads(in_a_child(IMPORT, json.dumps([sets, OPTIONAL])))
    assert missing == [], "what is not installed cannot be seen to be left alone"
    return dict(zip(sets, found, strict=True))


@pytest.mark.parametrize("half", HALVES, ids=lambda names: names[-1])
def test_the_halves_of_mlwe_do_not_load_each_other(
    loaded: dict[tuple[str, ...], list[str]], half: tuple[str, ...]
) -> None:
    assert set(half) <= set(loaded[half])
    assert {f"ciphertune_mlwe.{name}" for name in HALVES[half]} & set(loaded[half]) == set()


@pytest.mark.parametrize("modules", [WORKER, *MOST], ids=lambda names: names[-1])
def test_a_worker_and_the_contracts_load_no_client_and_nothing_optional(
    loaded: dict[tuple[str, ...], list[str]], modules: tuple[str, ...]
) -> None:
    names = loaded[modules]
    assert set(modules) <= set(names)
    assert [name for name in names if name.partition(".")[0] in OPTIONAL] == []
    rooms = {f"ciphertune.{room}" for room in CLIENT_ROOMS}
    assert [name for name in names if ".".join(name.split(".")[:2]) in rooms] == []


@pytest.mark.parametrize("modules", MOST, ids=" ".join)
def test_few_modules_are_loaded(loaded: dict[tuple[str, ...], list[str]], modules: tuple[str, ...]) -> None:
    ours = [name for name in loaded[modules] if name.startswith("ciphertune")]
    assert len(ours) <= MOST[modules], ours


@pytest.mark.slow
def test_no_module_takes_the_place_of_a_public_function() -> None:
    assert in_a_child(CALL).strip() == "called"
