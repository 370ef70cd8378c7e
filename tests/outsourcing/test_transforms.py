"""``torch.func`` computes with outsourced layers; what records or copies a model is refused in plain words."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import ciphertune
from ciphertune.errors import OutsourcedWeightError

# torch's own rules for forward-mode derivatives are compiled by torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")


class Net(nn.Module):
    """Two layers that share their input, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.q_proj, self.k_proj, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.out(torch.sigmoid(self.q_proj(x)) * self.k_proj(x))


@pytest.fixture(params=[("clear", 1e-5), ("mlwe", 0.03)], ids=lambda param: param[0])
def pair(request: Any) -> tuple[nn.Module, nn.Module, float]:
    """A model, the same outsourced, and the error to be expected."""
    torch.manual_seed(0)
    plain = Net()
    for layer in (plain.q_proj, plain.k_proj, plain.out):
        layer.requires_grad_(False)
    to, tolerance = request.param
    return plain, ciphertune.outsource(copy.deepcopy(plain), to, layers=["q_proj", "k_proj", "out"]), tolerance


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


def of_parameters(transform: Callable[[Any, dict[str, Tensor]], Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda model: transform(model, {n: p.detach() for n, p in model.named_parameters() if "first" in n})


def loss(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda trained: functional_call(model, trained, (x,)).square().sum()


TRANSFORMS: dict[str, Callable[[nn.Module], Tensor]] = {
    "vmap": lambda model: vmap(model)(X),
    "vmap along the last dimension": lambda model: vmap(model, in_dims=1)(X.t().contiguous()),
    "grad": of_parameters(lambda model, trained: grad(loss(model, X))(trained)["first.weight"]),
    "gradients of each example": of_parameters(
        lambda model, trained: vmap(lambda x: grad(loss(model, x[None]))(trained)["first.weight"])(X)
    ),
    "vjp": lambda model: vjp(model, X)[1](torch.ones(3, 4))[0],
    "jvp": lambda model: jvp(model, (X,), (X.flip(0),))[1],
    "jacrev": lambda model: jacrev(model)(X[0]),
    "jacfwd": lambda model: jacfwd(model)(X[0]),
    "hessian": lambda model: hessian(lambda x: model(x).square().sum())(X[0]),
    "a batch of gradients": lambda model: batch_of_gradients(model),
    "autograd's jacobian": lambda model: jacobian(model, X[0], vectorize=True),
    "autograd's jacobian forward": lambda model: jacobian(model, X[0], vectorize=True, strategy="forward-mode"),
}


def batch_of_gradients(model: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    y = model(x)
    each = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(3))
    (gradients,) = torch.autograd.grad(y, x, each, is_grads_batched=True)
    return gradients


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_give_what_they_give_in_the_clear(pair: tuple[nn.Module, nn.Module, float], name: str) -> None:
    plain, ours, tolerance = pair
    wanted, found = TRANSFORMS[name](plain), TRANSFORMS[name](ours)
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < tolerance


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda model: torch.jit.trace(model, X), r"torch.jit cannot trace it"),
        (torch.jit.script, r"torch.jit cannot compile it"),
        (torch.fx.symbolic_trace, r"torch.fx cannot trace into it: make it a leaf"),
        (lambda model: torch.export.export(model, (X,)), r"cannot be exported \(torch.export, ONNX\)"),
        (pickle.dumps, "cannot be pickled or sent to another process"),
        (lambda model: model.share_memory(), "cannot be shared with another process"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_records_and_copies_are_refused(attempt: Callable[[nn.Module], Any], message: str) -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "clear", layers=["0"])
    with pytest.raises(OutsourcedWeightError, match=message):
        attempt(model)


def test_a_leaf_of_torch_fx() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Linear)

    model = ciphertune.outsource(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "clear", layers="all")
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(X), model(X))
