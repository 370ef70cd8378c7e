"""A client half whose preparation is used up is asked for another, and the product goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Farm
from rationed import TOKENS, RationedBackend, RationedClient
from torch import nn

import ciphertune
from ciphertune.bench.compare import Product, measure
from ciphertune.errors import NotPreparedError, SecurityError, WeightsError
from ciphertune.plugins import registry
from ciphertune.protocol import Message
from ciphertune.worker import SessionLimits, Worker


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 100, bias=False)
        self.b = nn.Linear(100, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.tanh(self.a(x)))
        return y


WEIGHTS = 6 * 100 + 100 * 3
X = torch.linspace(-1, 1, 18).reshape(3, 6)
WHOLE = {"one": [["a"], ["b"]]}


@pytest.fixture(autouse=True)
def client(register: Callable[[str, Any], None]) -> Callable[[], RationedClient]:
    """The client half that was made last."""
    register(registry.BACKENDS, RationedBackend)
    return lambda: RationedBackend.clients[-1]


def outsourced(farm: Farm, **options: Any) -> nn.Module:
    farm.plant(Net(), "rationed?weight_bits=8", **WHOLE)  # type: ignore[arg-type]
    model = Net()
    farm.outsource(model, "rationed", weight_bits=8, **options)
    return model


def test_a_group_that_is_used_up_is_prepared_again(farm: Farm, client: Any) -> None:
    """Three tokens a product: two products to a pass, each group by itself."""
    model = outsourced(farm)
    session = ciphertune.session_of(model)
    first = model(X).detach()
    assert client().passes == 2
    for passes in (2, 4, 4, 6):
        assert torch.equal(model(X).detach(), first)
        assert client().passes == passes
    assert session.set_up.weights == passes // 2 * WEIGHTS
    assert session.traffic.requests == 10, "each product was sent once"


def test_a_session_prepares_when_it_is_told_to(farm: Farm, client: Any) -> None:
    """Between products, so that none waits for it."""
    model = outsourced(farm)
    session = ciphertune.session_of(model)
    assert session.prepare() == 0
    for _ in range(4):
        model(X)
        assert session.prepare() == WEIGHTS
    assert client().passes == 10
    session.close()
    with pytest.raises(SecurityError, match="nothing can be prepared"):
        session.prepare()
    plain = ciphertune.outsource(Net(), "clear", "all")
    assert ciphertune.session_of(plain).prepare() == 0
    ciphertune.session_of(plain).close()


def test_both_directions(farm: Farm, client: Any) -> None:
    model = outsourced(farm)
    x = X.clone().requires_grad_()
    gradients = []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[2])
    assert client().passes == 4


def test_threads_that_use_up_each_other_s_share(farm: Farm, client: Any) -> None:
    model = outsourced(farm)
    expected = model(X).detach()
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        found = list(pool.map(lambda _: model(X), range(40)))
    assert all(torch.equal(each, expected) for each in found)
    assert client().passes >= 2 * 41 * 3 // TOKENS


def test_a_client_half_that_never_has_enough(farm: Farm, client: Any) -> None:
    """More tokens than a pass brings: after some passes that brought nothing the error is the caller's."""
    model = outsourced(farm)
    with pytest.raises(NotPreparedError, match="8 tokens are left"):
        model(torch.ones(TOKENS + 1, 6))
    assert client().passes == 2, "what is full asks for no codes"
    model(X)


def test_codes_of_the_model_in_hand_are_those_of_the_worker_later(farm: Farm, client: Any) -> None:
    """The model's own weights have left by then."""
    model = outsourced(farm)
    session = ciphertune.session_of(model)
    assert session.set_up.bytes_down == 0
    for _ in range(3):
        model(X)
    assert session.set_up.bytes_down == WEIGHTS


def test_codes_of_a_folder_are_read_there_again(farm: Farm, client: Any, tmp_path: Path) -> None:
    ciphertune.split(Net(), tmp_path / "bundle", layers="all")
    farm.plant(Net(), "rationed?weight_bits=8", **WHOLE)  # type: ignore[arg-type]
    for host in farm.hosts.values():
        host.worker = Worker(host.held, limits=SessionLimits(readings=0))
    with torch.device("meta"):
        skeleton = Net()
    folder = tmp_path / "bundle"
    to = farm.selection("rationed", weight_bits=8)
    model = ciphertune.load_client(folder / "client", to, skeleton=skeleton, weights=folder / "worker")
    session = ciphertune.session_of(model)
    farm.sessions.append(session)
    for _ in range(3):
        model(X)
    assert client().passes == 4
    assert session.set_up.bytes_down == 0


def refused(request: Message) -> Message:
    return Message("error", {"code": "quota", "message": "more may be read in 9 minutes"})


def test_codes_that_cannot_be_had_any_more(farm: Farm) -> None:
    model = outsourced(farm)
    for _ in range(2):
        model(X)
    for host in farm.hosts.values():
        host.on("weights", refused, always=True)
    with pytest.raises(WeightsError, match="more may be read in 9 minutes"):
        model(X)


def test_comparing_prepares_as_often_as_rounds_need(client: Any) -> None:
    product = Product(5, 6, 7)
    assert measure("rationed?weight_bits=8", product, product, repeat=3, seed=0)["rounds"] == 3
    assert client().passes == 4
