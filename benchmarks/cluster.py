"""A training step with one worker on a Ray cluster of this machine, against one over zmq, in the same run.

python benchmarks/cluster.py             # some five minutes; writes cluster.json beside this file
python docs/generate.py                  # the table
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from sweep import machine

import ciphertune
from ciphertune.bench.train import bench_train

HERE = Path(__file__).parent
KEPT = (
    *("tokens", "steps", "plaintext_step_s", "encrypted_step_s"),
    *("against_step_s", "against_ratio", "bytes_up", "bytes_down"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "cluster.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        ciphertune.split("smollm2", f"{folder}/bundle")
        found = bench_train(
            "smollm2",
            f"mlwe+ray://local?bundle={folder}/bundle&workers=1&cpus={os.cpu_count()}",
            arguments.tokens,
            steps=arguments.steps,
            repeat=arguments.repeat,
            against="mlwe+zmq://",
        )
    result = {"machine": machine(load), **{name: found[name] for name in KEPT}}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"ray {found['encrypted_step_s']:.2f} s, zmq {found['against_step_s']:.2f} s: {found['against_ratio']:.2f}")


if __name__ == "__main__":
    main()
