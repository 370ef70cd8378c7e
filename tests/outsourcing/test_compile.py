"""``torch.compile`` compiles what is around outsourced layers, and never looks into a session."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ciphertune

# The compiler asks tensors that are no leaves for their gradients.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

BACKENDS = [("clear", 1e-6), ("simulation", 0.02), ("mlwe", 0.02)]


class Net(nn.Module):
    """Two layers that share their input, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x * self.scale)
        return self.out(torch.sigmoid(self.q_proj(x)) * self.k_proj(x))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for layer in (model.q_proj, model.k_proj, model.out):
        layer.requires_grad_(False)
    return model


def step(model: nn.Module, scale: nn.Parameter, x: Tensor) -> tuple[float, Tensor]:
    scale.grad = None
    loss = model(x).square().mean()
    loss.backward()
    assert scale.grad is not None
    return float(loss.detach()), scale.grad.clone()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("to", "tolerance"), BACKENDS)
def test_a_compiled_model_gives_the_same_losses_gradients_and_requests(to: str, tolerance: float) -> None:
    reference, model = net(), ciphertune.outsource(net(), to, "all")
    session = ciphertune.session_of(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        x = torch.randn(32, 16)
        loss, gradient = step(reference, reference.scale, x)
        before = session.traffic.requests
        found, mine = step(compiled, model.scale, x)  # type: ignore[arg-type]
        assert found == pytest.approx(loss, rel=tolerance)
        assert float((mine - gradient).norm() / gradient.norm()) < tolerance
        assert session.traffic.requests == before + 4
    session.close()


@pytest.mark.parametrize(("to", "tolerance"), BACKENDS)
def test_a_compiled_step_with_its_backward_pass(to: str, tolerance: float) -> None:
    reference, model = net(), ciphertune.outsource(net(), to, "all")
    x = torch.randn(32, 16)
    expected, gradient = step(reference, reference.scale, x)

    def whole(x: Tensor) -> Tensor:
        loss: Tensor = model(x).square().mean()
        loss.backward()
        return loss.detach()

    found = torch.compile(whole, backend="eager")(x)
    assert float(found) == pytest.approx(expected, rel=tolerance)
    assert model.scale.grad is not None
    assert float((model.scale.grad - gradient).norm() / gradient.norm()) < tolerance
    ciphertune.session_of(model).close()


def test_a_compiled_model_draws_fresh_randomness_every_time() -> None:
    model = ciphertune.outsource(net(), "mlwe", "all")
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(32, 16)
    with torch.no_grad():
        found = [compiled(x) for _ in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    ciphertune.session_of(model).close()


def test_the_compiler_is_not_imported_with_ciphertune() -> None:
    code = "import sys, torch, ciphertune.linear; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
