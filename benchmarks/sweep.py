"""What the plots in docs/performance.md are made of, measured.

``python benchmarks/sweep.py kernels`` measures products over tokens and features, some minutes on a quiet machine, and
``python benchmarks/sweep.py losses`` the loss curves of both demos, which do not depend on how busy the machine is.
Each writes its file beside this one, or where ``--json`` says. ``python docs/generate.py`` then makes plots and tables.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ciphertune.bench.compare import machine as described
from ciphertune.bench.kernel import bench_kernel
from ciphertune.runs.demo import run_demo

HERE = Path(__file__).parent
TO = "mlwe"


def kernels(tokens: list[int], features: list[int], repeat: int) -> dict[str, Any]:
    """Square products, every number of tokens with every number of features."""
    load = os.getloadavg()[0]
    grid = []
    for k in features:
        for t in tokens:
            found = bench_kernel(TO, t, k, k, repeat)
            grid.append(found)
            print(f"T={t} K={k}: {found['evaluate_ratio']:.2f}, {found['total_ratio']:.2f}", flush=True)
    return {"machine": machine(load), "grid": grid}


def losses(quick: int, model: int) -> dict[str, Any]:
    """Both demos: losses of every step in the clear and encrypted, and what was held out."""
    runs = []
    for is_quick, steps in ((True, quick), (False, model)):
        if not steps:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = run_demo(Path(folder), quick=is_quick, steps=steps, progress=lambda line: print(line, flush=True))
        runs.append(
            {
                **{
                    name: getattr(result, name)
                    for name in ("model", "data", "to", "metric", "unit", "per_step", "seed")
                },
                "held_out_before": result.held_out_before,
                "plaintext": {"losses": result.plaintext.losses, "held_out": result.plaintext.held_out},
                "encrypted": {"losses": result.encrypted.losses, "held_out": result.encrypted.held_out},
            }
        )
    return {"runs": runs}


def machine(load: float) -> dict[str, Any]:
    """Of what machine the figures are, and how busy it was when they began: the 1-minute load."""
    return {**described(), "load_before": round(load, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "losses"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--features", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--steps", type=int, nargs=2, default=[80, 20], help="of the network and the language model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "kernels":
        found = kernels(arguments.tokens, arguments.features, arguments.repeat)
    else:
        found = losses(*arguments.steps)
    path = arguments.json or HERE / f"{'sweep' if arguments.what == 'kernels' else 'losses'}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
