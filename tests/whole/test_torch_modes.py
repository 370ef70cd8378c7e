"""Whatever modes of torch a caller is in: results are the same, and what is kept stays usable outside of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.worker.worker import Worker

BACKENDS = ["clear?weight_bits=8", "simulation", "mlwe", "mlwe?weight_bits=16"]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Elsewhere(TorchFunctionMode):
    """Makes what is made without a dtype in float64, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("empty", "zeros", "ones", "arange", "randn", "full"):
            kwargs.setdefault("dtype", torch.float64)
            kwargs.setdefault("device", "meta")
        return func(*args, **kwargs)


class Halving(TorchDispatchMode):
    """Halves what a matrix product gives, as a mode that computes in another way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if func in (torch.ops.aten.mm.default, torch.ops.aten.linear.default) else result


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "deterministic": deterministic,
    "function mode": Elsewhere,
    "dispatch mode": Halving,
}


class Attention(nn.Module):
    """Two layers that share their input, and one behind them that trains through them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.q_proj, self.k_proj = nn.Linear(12, 20), nn.Linear(12, 20)
        self.out = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.out(self.q_proj(x) * torch.sigmoid(self.k_proj(x)))
        return y


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """An output, and the gradient of the layer that stays at the client."""
    y = model(x)
    y.square().sum().backward()
    assert model.first.weight.grad is not None
    return y.detach(), model.first.weight.grad  # type: ignore[return-value]


def close(got: Tensor, want: Tensor, tolerance: float = 2e-2) -> bool:
    return bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to", BACKENDS)
def test_a_first_product_in_a_mode_spoils_nothing(to: str, mode: str, made_inside: bool) -> None:
    torch.manual_seed(3)
    plain = Attention()
    x = torch.randn(9, 12)
    want = gradients(copy.deepcopy(plain), x)
    ours = copy.deepcopy(plain)
    if not made_inside:
        ciphertune.outsource(ours, to=to, layers=["q_proj", "k_proj", "out"])
    with MODES[mode]():
        if made_inside:
            ciphertune.outsource(ours, to=to, layers=["q_proj", "k_proj", "out"])
        inside = ours(x).detach()
    # bfloat16 under autocast; and what the client itself computes is the mode's business.
    assert inside.device.type == "cpu"
    if mode != "dispatch mode":
        assert close(inside, want[0], 5e-2)
    # Longer batches need more of the secret, and more scratch memory.
    longer = x.repeat(40, 1)
    assert close(ours(longer).detach(), want[0].repeat(40, 1))
    y, gradient = gradients(ours, x)
    assert close(y, want[0])
    assert close(gradient, want[1], 4e-2)
    ciphertune.restore(ours)
    again = gradients(copy.deepcopy(ours), x)
    assert close(again[0], want[0])


@pytest.mark.parametrize("mode", ["float64", "bfloat16", "default device", "deterministic", "function mode"])
@pytest.mark.parametrize("to", BACKENDS[:2])
def test_results_are_the_same_to_the_last_bit(to: str, mode: str) -> None:
    torch.manual_seed(3)
    plain, x = Attention(), torch.randn(9, 12)
    results = []
    for context in (contextlib.nullcontext, MODES[mode]):
        model = copy.deepcopy(plain)
        with context():
            ciphertune.outsource(model, to=to, layers=["q_proj", "k_proj", "out"])
            y, gradient = gradients(model, x)
        scale = model.out.info.scale
        results.append((y, gradient, scale, scale.dtype))
    for one, other in zip(*results, strict=True):
        assert one == other if isinstance(one, torch.dtype) else torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_closing_inside_a_mode(mode: str) -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Linear(8, 8)), to="mlwe", layers="all")
    model(torch.ones(2, 8))
    with MODES[mode]():
        ciphertune.session_of(model).close()


def test_outputs_computed_in_inference_mode_are_not_used_outside_of_it() -> None:
    """A sibling asks with the same input after the first of them was asked in inference mode."""
    torch.manual_seed(3)
    model = ciphertune.outsource(Attention(), to="clear", layers=["q_proj", "k_proj"])
    x, weight = torch.randn(4, 12), torch.randn(4, 20, requires_grad=True)
    with torch.inference_mode():
        model.q_proj(x)
    (model.k_proj(x) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("mode", ["inference mode", "default device", "float64", "bfloat16"])
def test_a_client_loaded_in_a_mode_trains_outside_of_it(mode: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model = tiny("llama")
    ids = torch.arange(12).reshape(1, 12)
    want = model(input_ids=ids, labels=ids).loss.detach()
    ciphertune.split(model, tmp_path / "bundle")
    worker = Worker(load_worker(tmp_path / "bundle" / "worker"))
    with MODES[mode]():
        client = ciphertune.load_client(tmp_path / "bundle" / "client", to="clear?weight_bits=8", worker=worker)
        client(input_ids=ids)
    loss = client(input_ids=ids, labels=ids).loss
    assert close(loss.detach(), want)
    loss.backward()
    gradient = client.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
