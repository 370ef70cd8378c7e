"""What a worker in another process costs: a step, a round trip, the client's memory, bytes, and the memory of a split.

python benchmarks/separate.py            # some ten minutes, 5 GB of disk; writes separate.json beside this file
python docs/generate.py                  # the table
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import split_memory
from sweep import machine

import ciphertune
from ciphertune.bench.link import bench_link
from ciphertune.bench.train import bench_train
from ciphertune.planning.plan import make_plan

HERE = Path(__file__).parent

# The client's own memory in a process of its own: above an interpreter that has imported everything, once the part is
# loaded, and after a training step.
_CLIENT = """
import json, sys
from pathlib import Path
import torch, transformers, peft, accelerate
import ciphertune
from ciphertune.plugins.manager import plugin_manager
def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")][0]
getattr(transformers, "LlamaForCausalLM"), plugin_manager()
before = own()
model = ciphertune.load_client(Path(sys.argv[1]), sys.argv[2])
loaded = own() - before
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
ids = torch.randint(1000, (1, int(sys.argv[3])))
model(input_ids=ids, labels=ids).loss.backward()
print(json.dumps({"loaded_bytes": loaded, "stepped_bytes": own() - before}))
ciphertune.session_of(model).close()
"""


def client_memory(folder: Path, tokens: int) -> dict[str, int]:
    """Bytes of a client of SmolLM2 that no file backs, and of the weights in its part."""
    from ciphertune.workloads.local_worker import serving

    result = ciphertune.split("smollm2", folder / "bundle")
    with serving("smollm2", "mlwe+zmq://") as served:
        command = [sys.executable, "-c", _CLIENT, str(result.client), served, str(tokens)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return {"tokens": tokens, "weight_bytes": result.client_bytes, **found}


def measured(tokens: int, steps: int) -> dict[str, Any]:
    """All of it, one after the other."""
    step = bench_train("smollm2", "mlwe+zmq://", tokens, steps=steps, against="mlwe")
    with tempfile.TemporaryDirectory() as folder:
        memory = client_memory(Path(folder), 64)
        split = split_memory.measured(Path(folder))
    plan = make_plan("smollm2", tokens=tokens, measure=False)
    return {
        "step": {"tokens": tokens, **{k: step[k] for k in ("encrypted_step_s", "against_step_s", "against_ratio")}},
        "link": bench_link("mlwe+zmq://"),
        "client": memory,
        "sharing": (plan.bytes_up + plan.bytes_down) / plan.bytes_without_sharing,
        "split": split,
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of the table in docs/performance.md."""
    step, link, client, split = (found[name] for name in ("step", "link", "client", "split"))
    times = f"{step['encrypted_step_s']:.1f} s / {step['against_step_s']:.1f} s"
    return [
        (
            f"SmolLM2 step of {step['tokens']:,} tokens, `mlwe+zmq` with one worker / `mlwe` in this process",
            f"{step['against_ratio']:.2f} ({times})",
            "≤ 1.25",
        ),
        (
            "round trip of an empty request, median / 99th percentile",
            f"{1e3 * link['median_s']:.2f} ms / {1e3 * link['p99_s']:.2f} ms",
            "≤ 0.5 / 5 ms",
        ),
        (
            f"client's memory after loading SmolLM2's part ({client['weight_bytes'] / 1e6:.0f} MB of weights), above "
            "an interpreter with torch, transformers and peft",
            f"{client['loaded_bytes'] / 1e6:.0f} MB, most of it hints, which `hint_memory` bounds",
            "",
        ),
        (
            f"the same after a training step of {client['tokens']} tokens",
            f"{client['stepped_bytes'] / 1e6:.0f} MB",
            "",
        ),
        ("bytes of a step with inputs shared / without", f"{found['sharing']:.2f}", "≤ 0.75"),
        (
            f"memory of its own that splitting a {split['weights'] / 1e9:.2f}-billion-weight Llama "
            f"({2 * split['weights'] / 1e9:.1f} GB) takes, head included; largest block "
            f"{split['largest'] / 1e6:.0f} million weights",
            f"{split['own_bytes'] / 1e6:.0f} MB",
            "near a block and the largest tensor",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, default=HERE / "separate.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    result = {"machine": machine(load), **measured(arguments.tokens, arguments.steps)}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows(result):
        print(*row[:2], sep=": ")


if __name__ == "__main__":
    main()
