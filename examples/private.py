"""Fine-tune adapters with differential privacy, through Opacus, while workers evaluate the frozen layers.

    pip install "ciphertune[private]"
    python examples/private.py --to mlwe --epochs 5

Prints the loss of every epoch and the epsilon that the adapter has at its end.
"""

from __future__ import annotations

import argparse
import secrets

import peft
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ciphertune


def train(to: str, epochs: int, noise: float, clip: float, delta: float, samples: int = 400) -> float:
    """Train, and return epsilon.

    Args:
        to: selection string.
        epochs: passes over the data.
        noise: standard deviation of the noise on a step's sum of gradients, over ``clip``.
        clip: norm that the gradient of every sample is cut to.
        delta: chance that the bound does not hold; below one over the number of samples.
        samples: of the data set, which is made up.
    """
    data = torch.randn(samples, 16, generator=torch.Generator().manual_seed(0))
    labels = (data[:, :2].sum(dim=1) > 0).long()
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 2)).requires_grad_(False)
    ciphertune.outsource(network, to, "all")
    model = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = PrivacyEngine()
    private, optimizer, batches = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(adapters, lr=2e-2),
        data_loader=DataLoader(TensorDataset(data, labels), batch_size=40),
        noise_multiplier=noise,
        max_grad_norm=clip,
        # Not of the seed that others may know.
        noise_generator=torch.Generator().manual_seed(secrets.randbits(63)),
    )
    try:
        for epoch in range(epochs):
            total = torch.zeros(())
            for x, target in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(private(x), target)
                loss.backward()
                optimizer.step()
                total += loss.detach() / len(batches)
            print(f"epoch {epoch + 1}: loss {float(total):.3f}")
    finally:
        ciphertune.session_of(model).close()
    epsilon: float = engine.get_epsilon(delta)
    print(f"epsilon {epsilon:.2f} at delta {delta:g}")
    return epsilon


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Adapters trained with differential privacy.")
    parser.add_argument("--to", default="mlwe")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    chosen = parser.parse_args()
    train(chosen.to, chosen.epochs, chosen.noise, chosen.clip, chosen.delta)
