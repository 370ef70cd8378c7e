"""A small network trained on two half moons learns two circles, by LoRA, with its linear layers somewhere else.

python examples/circles.py --to mlwe
python examples/circles.py --to mlwe+zmq:// --steps 20 --json

The encryption, and where the layers are evaluated, is the string after ``--to`` and nothing else. A remote transport
without an endpoint, as in ``mlwe+zmq://``, gets a worker process of its own on this machine.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn

import ciphertune
from ciphertune.workloads.local_worker import serving

WIDTH = 16
OUTSOURCED = ["0", "2"]


def samples(make: Any, seed: int, **shape: float) -> tuple[Tensor, Tensor]:
    """512 points (512, 2) and their classes (512,)."""
    x, y = make(512, noise=0.05, random_state=seed, **shape)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def trained_on_moons() -> nn.Sequential:
    """A 2-16-16-2 network, always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    x, y = samples(make_moons, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.requires_grad_(False)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of points classified correctly."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def adapt(base: nn.Module, seed: int) -> Any:
    """The network with LoRA adapters of rank 4 on every layer."""
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))


def train(model: nn.Module, steps: int, batch: int, seed: int) -> list[float]:
    """An ordinary training loop; the loss of every step."""
    x, y = samples(make_circles, 1, factor=0.4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        picked = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(to: str, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Train through the layers behind ``to``, then try the adapter on the original network."""
    base = trained_on_moons()
    held_out = samples(make_circles, 2, factor=0.4)
    clear = train(adapt(copy.deepcopy(base), seed), steps, batch, seed)
    with serving(base, to) as served:
        model = ciphertune.outsource(adapt(copy.deepcopy(base), seed), served, layers=OUTSOURCED)
        session = ciphertune.session_of(model)
        losses = train(model, steps, batch, seed)
        session.close()
    original = adapt(copy.deepcopy(base), seed)
    set_peft_model_state_dict(original, get_peft_model_state_dict(model))
    return {
        "to": to,
        "losses": losses,
        "losses_in_the_clear": clear,
        "accuracy_before": accuracy(base, *held_out),
        "accuracy": accuracy(original, *held_out),
        "traffic": dataclasses.asdict(session.traffic),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="mlwe", help="selection string")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="points a step")
    parser.add_argument("--seed", type=int, default=1, help="of the adapters and the batches")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = run(options.to, options.steps, options.batch, options.seed)
    if options.json:
        print(json.dumps(result))
        return
    for step, (loss, clear) in enumerate(zip(result["losses"], result["losses_in_the_clear"], strict=True), 1):
        print(f"step {step:3}  loss {loss:.4f}  in the clear {clear:.4f}")
    print(f"accuracy on held-out circles: {result['accuracy_before']:.3f} before, {result['accuracy']:.3f} after")
    print(f"sent {result['traffic']['bytes_up']} bytes, received {result['traffic']['bytes_down']}")


if __name__ == "__main__":
    main()
