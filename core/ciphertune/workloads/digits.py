"""A small network for handwritten digits, adapted by LoRA from upright digits to rotated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError
from ciphertune.workloads.workload import Batch, Workload

_EXTRA = 'pip install "ciphertune[demo]"'


def _images() -> tuple[Tensor, Tensor]:
    datasets = import_optional("sklearn.datasets", _EXTRA)
    bunch = datasets.load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target)


def _pretrain(x: Tensor, y: Tensor) -> nn.Sequential:
    """Train a 64-128-128-10 network on upright digits, which takes about a second."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    return model


def _accuracy(model: nn.Module, data: Sequence[Batch], metrics: Mapping[str, float]) -> float:
    """Share of samples classified correctly, in percent."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    model.train(training)
    return 100 * right / sum(len(y) for _, y in data)


def digits_mlp(*, batches: int, samples: int, held_out: int, seed: int, rank: int) -> Workload:
    """Load the workload ``mlp``. Samples are drawn with replacement, so there may be any number of batches."""
    peft: Any = import_optional("peft", _EXTRA)
    if samples < 1:
        raise ConfigError(f"samples must be 1 or more, not {samples}")
    images, labels = _images()
    split = len(images) * 3 // 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(len(images))
        x, y = images[order], labels[order]
        base = _pretrain(x[:split].flatten(1), y[:split])
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    rotated = x.rot90(1, (1, 2)).flatten(1)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2", "4"]))
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randint(split, (samples,), generator=generator) for _ in range(batches)]
    held = torch.split(torch.arange(split, len(x)), samples)[:held_out]
    return Workload(
        name="MLP 64-128-128-10",
        data="handwritten digits rotated by 90 degrees (scikit-learn), after upright ones",
        model=model,
        train=[(rotated[pick], y[pick]) for pick in picks],
        held_out=[(rotated[pick], y[pick]) for pick in held],
        loss_fn=nn.functional.cross_entropy,
        metric=("accuracy (%)", _accuracy),
        learning_rate=1e-2,
        unit="samples",
    )
