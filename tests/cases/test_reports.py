"""What people reported of fine-tuning, splitting, serving and command lines elsewhere, as small cases here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import ciphertune

MODES = ("clear", "simulation", "mlwe")


def toy(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def error(got: Tensor, want: Tensor) -> float:
    """Relative, with the rounding of weights to 8 bits in it."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def compare(
    make: Callable[[], nn.Module], run: Callable[[nn.Module], Sequence[Tensor]], mode: str, tolerance: float = 2e-2
) -> None:
    """``run(model)`` gives tensors; those of the outsourced model are those of the plain one."""
    wanted = [tensor.detach().clone() for tensor in run(make())]
    model = ciphertune.outsource(make(), to=mode, layers="all")
    for got, want in zip(run(model), wanted, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert error(got, want) <= tolerance
    ciphertune.session_of(model).close()


def outputs_and_gradients(x: Tensor) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        assert given.grad is not None
        return y, given.grad

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(16, 1, 16), (1, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_layer_with_one_input_feature(mode: str, sizes: tuple[int, ...], tokens: int) -> None:
    """Time and value embeddings and bottlenecks of one get the right input gradient."""
    x = torch.randn(tokens, sizes[0], generator=torch.Generator().manual_seed(2))
    compare(lambda: toy(*sizes), outputs_and_gradients(x), mode, 5e-2)
