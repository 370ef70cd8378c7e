"""Small models and plugins that several test modules use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.plugins import PluginManager
from ciphertune.session import Exchange


class Attention(nn.Module):
    """Layers with the names and sharing of a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 24)
        self.k_proj = nn.Linear(24, 12, bias=False)
        self.v_proj = nn.Linear(24, 12)
        self.o_proj = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x).tanh(), self.v_proj(x)], -1))
        return out


def block(seed: int = 0) -> nn.Sequential:
    """A linear layer, an attention-like block and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), Attention(), nn.Linear(24, 5))


class Recorder:
    """A hook plugin that keeps every exchange."""

    def __init__(self) -> None:
        self.before: list[Exchange] = []
        self.exchanges: list[Exchange] = []

    @ciphertune.hookimpl
    def ciphertune_before_request(self, exchange: Exchange) -> None:
        self.before.append(exchange)

    @ciphertune.hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)

    def count(self, direction: str) -> int:
        return sum(exchange.direction == direction for exchange in self.exchanges)

    def layers(self, direction: str) -> list[tuple[str, ...]]:
        return [exchange.layers for exchange in self.exchanges if exchange.direction == direction]


def recorded() -> tuple[PluginManager, Recorder]:
    """A plugin manager with a recorder and nothing else."""
    manager, recorder = PluginManager(), Recorder()
    manager.register(recorder, "recorder")
    return manager, recorder


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a fixed functional of the output."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def relative(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())
