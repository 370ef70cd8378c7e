"""Denormals are zeros wherever the client computes on decrypted values, and the caller's setting is his again after."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import warm
from torch import nn

import ciphertune
from ciphertune._support.denormals import _openmp, flushes, flushing
from ciphertune.errors import NonFiniteLossError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.training.inference import InferenceModel
from ciphertune_mlwe import native

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, params=[False, True], ids=["caller keeps them", "caller flushes"])
def callers(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = flushes()
    torch.set_flush_denormal(request.param)
    yield request.param
    assert flushes() == request.param
    torch.set_flush_denormal(before)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8))


class Seeing(nn.Module):
    """Notes in which state it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(flushes())
        return x


def outsourced(plugins: PluginManager | None = None) -> nn.Module:
    return ciphertune.outsource(model(), "mlwe", layers=["1"], plugins=plugins)


def test_products(callers: bool, empty_cache: Any) -> None:
    manager, seen = PluginManager(), []

    class Listening:
        @hookimpl
        def ciphertune_after_reply(self) -> None:
            seen.append(flushes())

    manager.register(Listening())
    made = outsourced(manager)
    x = X.clone().requires_grad_()
    made(x).sum().backward()
    assert flushes() == callers
    assert seen == [True, True]
    with pytest.raises(ciphertune.InputError):
        made(x).backward(torch.full((5, 8), float("nan")))
    assert flushes() == callers
    ciphertune.session_of(made).close()


@pytest.mark.parametrize("interleave", [1, 2])
def test_training_and_evaluation(callers: bool, empty_cache: Any, interleave: int) -> None:
    seeing = Seeing()
    made = nn.Sequential(outsourced(), seeing)
    trainer = ciphertune.LoraTrainer(
        made,
        loss_fn=nn.functional.mse_loss,
        steps=2,
        accumulation=2,
        interleave=interleave,
        require_adapter=False,
    )
    trainer.train([(X, torch.zeros(5, 8))] * 4)
    trainer.evaluate([(X, torch.zeros(5, 8))])
    InferenceModel(made)(X)
    assert seeing.seen
    assert all(seeing.seen)
    assert flushes() == callers
    with pytest.raises(NonFiniteLossError):
        trainer.train([(X * float("nan"), torch.zeros(5, 8))] * 8)
    assert flushes() == callers
    ciphertune.session_of(made).close()


def test_threads_of_the_compiled_loops() -> None:
    assert native._pool(2).submit(flushes).result()
    assert not threading.Thread(target=flushes).is_alive()


def test_a_thread_pool_of_torch_that_was_there_before() -> None:
    """Threads take the setting over when they are made, and those of torch live on: they are told."""
    probe = """
import torch
from ciphertune._support.denormals import _openmp, flushing
torch.set_num_threads(2)
x = torch.full((1 << 21,), 1e-20)
kept = [int((x * 1e-20).count_nonzero())]
with flushing():
    kept.append(int((x * 1e-20).count_nonzero()))
kept.append(int((x * 1e-20).count_nonzero()))
print(kept if _openmp() is not None else "no libgomp")
"""
    run = warm.run(probe)
    if "no libgomp" in run.stdout:
        pytest.skip("torch uses another OpenMP library here")
    assert run.stdout.strip() == str([1 << 21, 0, 1 << 21])


def test_nested(callers: bool) -> None:
    with flushing():
        with flushing():
            assert flushes()
        assert flushes()
    assert flushes() == callers


def test_what_is_too_small_for_helpers_is_computed_by_the_calling_thread() -> None:
    """Below the size at which helpers are told nobody helps: else their results would be denormal numbers still."""
    probe = """
import torch
from ciphertune._support.denormals import ALONE, flushing
torch.set_num_threads(2)
x = torch.full((1 << 21,), 1e-20)
assert int((x * 1e-20).count_nonzero()) == 1 << 21  # the pool is there
small = torch.full((ALONE - 1,), 1e-20)
left, right = torch.full((1, 8), 1e-20), torch.full((8, ALONE // 8 - 1), 1e-20)
with flushing(ALONE - 1):
    kept = [(small * 1e-20).count_nonzero(), (left @ right).count_nonzero()]
    kept.append(torch.zeros(1, right.shape[1]).addmm_(left, right).count_nonzero())
print([int(each) for each in kept])
"""
    run = warm.run(probe)
    assert run.stdout.strip() == "[0, 0, 0]"


@pytest.mark.skipif(_openmp() is None, reason="torch uses another OpenMP library here")
def test_helpers_are_told_from_the_size_on() -> None:
    probe = """
import torch
from ciphertune._support.denormals import ALONE, flushing
torch.set_num_threads(2)
x = torch.full((1 << 21,), 1e-20)
(x * 1e-20).count_nonzero()
with flushing(ALONE):
    print(int((x * 1e-20).count_nonzero()))
"""
    run = warm.run(probe)
    assert run.stdout.strip() == "0"


@pytest.mark.skipif(_openmp() is None, reason="torch uses another OpenMP library here")
def test_helpers_are_told_within_a_context_that_did_not_need_them() -> None:
    probe = """
import torch
from ciphertune._support.denormals import flushing
torch.set_num_threads(2)
x = torch.full((1 << 21,), 1e-20)
kept = [int((x * 1e-20).count_nonzero())]
with flushing(1):
    with flushing():
        kept.append(int((x * 1e-20).count_nonzero()))
    kept.append(int((x * 1e-20).count_nonzero()))
kept.append(int((x * 1e-20).count_nonzero()))
print(kept)
"""
    run = warm.run(probe)
    assert run.stdout.strip() == str([1 << 21, 0, 0, 1 << 21])
