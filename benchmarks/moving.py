"""A training step of small layers under the backends on Zama's libraries, ``mlwe``, and Concrete ML's own trainer.

``python benchmarks/moving.py``: seconds of one optimizer step (forward, backward, AdamW), the median of those after the
first, which compiles circuits and makes keys. Every row is a process of its own. Concrete ML's trainer, and the backend
``concrete-ml``, run in its environment alone: ``make concrete-ml``, then
``.venv-concrete-ml/bin/python benchmarks/moving.py``. What cannot run is listed with the reason.

``python benchmarks/moving.py --gpt2 --to mlwe``: seconds of a generated token of a model of GPT-2's size, with random
weights and a prompt of 8 tokens, the median of those after the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THEIRS = "Concrete ML itself"
ROWS = (THEIRS, "concrete-ml", "concrete-circuit", "concrete-glwe", "mlwe", "clear")


def measure(to: str, width: int, layers: int, points: int, steps: int) -> dict[str, Any]:
    """Seconds of each step of one row, in this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    class Network(nn.Module):
        """Layers of the same width, with the argument that Concrete ML's trainer asks for."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

        def forward(self, x: Any, labels: Any = None) -> Any:
            for layer in self.layers[:-1]:
                x = torch.relu(layer(x))
            return self.layers[-1](x)[:, :2]

    torch.manual_seed(0)
    names = [f"layers.{i}" for i in range(layers)]
    model: Any = get_peft_model(Network(), LoraConfig(r=4, target_modules=names))
    batches = [(torch.randn(points, width), torch.randint(2, (points,))) for _ in range(steps)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    marks: list[float] = []
    optimizer.register_step_post_hook(lambda *_: marks.append(time.perf_counter()))
    begun = time.perf_counter()
    if to == THEIRS:
        from concrete.ml.torch.lora import LoraTrainer  # type: ignore[import-not-found, unused-ignore]

        with tempfile.TemporaryDirectory() as folder:
            trainer = LoraTrainer(
                model, optimizer, nn.functional.cross_entropy, train_log_path=f"{folder}/log", eval_steps=10**9
            )
            trainer.compile(batches[0], n_bits=8)
            begun = time.perf_counter()
            trainer.train(batches, fhe="execute")
    else:
        import ciphertune

        ciphertune.outsource(model, to, layers=names)
        begun = time.perf_counter()
        ciphertune.LoraTrainer(
            model, optimizer=optimizer, loss_fn=nn.functional.cross_entropy, max_grad_norm=None
        ).train(batches)
        ciphertune.session_of(model).close()
    seconds = [after - before for before, after in zip([begun, *marks], marks, strict=False)]
    return {"first": seconds[0], "step": statistics.median(seconds[1:]), "steps": len(seconds)}


def generate(to: str, tokens: int) -> dict[str, Any]:
    """Seconds of generated tokens of a model of GPT-2's size, in this process."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.generation.streamers import BaseStreamer

    import ciphertune

    marks: list[float] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            marks.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.manual_seed(0)
    model = ciphertune.outsource(GPT2LMHeadModel(GPT2Config()).eval(), to)
    prompt = torch.randint(1000, (1, 8))
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=Clock(),
    )
    ciphertune.session_of(model).close()
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return {"first": seconds[0], "step": statistics.median(seconds[1:]), "steps": len(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--to", action="append", help=f"rows to measure; all of {', '.join(ROWS)} if not given")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gpt2", action="store_true", help="generate with a model of GPT-2's size instead")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = (given.width, given.layers, given.points, given.steps)
    if given.row:
        print(json.dumps(generate(given.row, given.steps + 4) if given.gpt2 else measure(given.row, *sizes)))
        return
    what = "token" if given.gpt2 else "step"
    if given.gpt2:
        print(f"tokens of a model of GPT-2's size, Python {sys.version.split()[0]}")
    else:
        print(f"{given.points} points through {given.layers} layers of {given.width}, Python {sys.version.split()[0]}")
    options = [f"--{name}={value}" for name, value in zip(("width", "layers", "points", "steps"), sizes, strict=True)]
    options += ["--gpt2"] if given.gpt2 else []
    for to in given.to or ROWS:
        run = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), *options, "--row", to],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            print(f"{to:20} cannot run: {(run.stderr.strip().splitlines() or ['no output'])[-1]}")
            continue
        found = json.loads(run.stdout.strip().splitlines()[-1])
        print(f"{to:20} {found['step']:9.4g} s a {what}; the first {found['first']:.4g} s")


if __name__ == "__main__":
    main()
