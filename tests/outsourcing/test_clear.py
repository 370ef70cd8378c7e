"""Outsourced layers computed in the clear for a while, session and hints kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Farm
from torch import nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.errors import InputError, NothingOutsourcedError, OutsourcedWeightError, WeightsError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))


def test_results_are_the_workers_and_nothing_is_sent(recorder: Any) -> None:
    exact, model = network(), network()
    ciphertune.outsource(model, "mlwe", layers="all", plugins=recorder.plugins)
    x = torch.randn(5, 24)
    encrypted = model(x).detach()
    session = ciphertune.session_of(model)
    before, seen = copy.copy(session.traffic), len(recorder.asked)
    with ciphertune.in_the_clear(model):
        given = x.clone().requires_grad_()
        clear = model(given)
        clear.sum().backward()
        assert torch.equal(model(x), clear), "no noise"
    assert (session.traffic.requests, session.traffic.bytes_up) == (before.requests, before.bytes_up)
    assert len(recorder.asked) == seen
    assert not session.closed
    # As rounded as the weights that the worker holds, and nearer to them than to the exact ones.
    rounded = ciphertune.restore(ciphertune.outsource(network(), "mlwe", layers="all"))
    torch.testing.assert_close(clear, rounded(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(clear, encrypted)
    torch.testing.assert_close(clear, encrypted, rtol=0.05, atol=0.02)
    other = x.clone().requires_grad_()
    rounded(other).sum().backward()
    torch.testing.assert_close(given.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(clear, exact(x), rtol=1e-6, atol=1e-7)
    model(x)
    assert session.traffic.requests > before.requests, "the next call is encrypted again"
    with pytest.raises(NothingOutsourcedError), ciphertune.in_the_clear(network()):
        pass


def test_blocks_nest_and_end_with_errors() -> None:
    model = ciphertune.outsource(network(), "simulation", layers="all")
    x = torch.randn(2, 24)
    with ciphertune.in_the_clear(model):
        clear = model(x)
        with pytest.raises(InputError), ciphertune.in_the_clear(model):
            model(torch.zeros(2, 24, dtype=torch.int64))
        assert torch.equal(model(x), clear)
    assert not torch.equal(model(x), clear)


def test_siblings_and_the_token_embedding(tiny: Any) -> None:
    ids = torch.randint(48, (2, 6))
    plain = tiny("llama").eval()
    model = ciphertune.outsource(copy.deepcopy(plain), "clear", layers="all", embeddings=True)
    with torch.no_grad(), ciphertune.in_the_clear(model):
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_client_without_weights_needs_the_original(farm: Farm, tmp_path: Path) -> None:
    original = network()
    ciphertune.split(network(), tmp_path, layers="all")
    farm.serve(w=load_worker(tmp_path / "worker"))
    skeleton = network().to("meta")
    model = ciphertune.load_client(tmp_path / "client", farm.selection("simulation"), skeleton=skeleton)
    farm.sessions.append(ciphertune.session_of(model))
    x = torch.randn(3, 24)
    with pytest.raises(OutsourcedWeightError, match="on other machines.*original="), ciphertune.in_the_clear(model):
        pass
    far = model(x)
    with ciphertune.in_the_clear(model, original):
        near = model(x)
    torch.testing.assert_close(near, far, rtol=0.05, atol=0.02)
    assert not torch.equal(near, far)
    other = network()
    with torch.no_grad():
        other[0].weight[3, 3] += 1
    with ciphertune.in_the_clear(model, other), pytest.raises(WeightsError, match="hash"):
        model(x)
    with (
        pytest.raises(OutsourcedWeightError, match="no layer '0'"),
        ciphertune.in_the_clear(model, nn.Sequential(nn.Tanh())),
    ):
        pass
