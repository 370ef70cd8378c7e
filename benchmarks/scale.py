"""One encrypted training step of a large model: seconds, memory of client and worker, bytes, and what was planned.

``python benchmarks/scale.py llama-3.2-1b --tokens 512`` writes random weights of a known shape to a folder, splits
them, starts a worker in a process of its own, and trains for a few steps in another. Each process reports its own peak
of memory. The disk that all of it needs is checked first. Results are printed, and added to ``scale.json`` with
``--keep``; then ``python docs/generate.py`` makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sweep import machine

from ciphertune.bundle.writer import split
from ciphertune.errors import ConfigError
from ciphertune.models.known import BUILT_IN, skeleton
from ciphertune.planning.plan import make_plan
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

HERE = Path(__file__).parent
_CLIENT = """
import json, resource, sys, time
import torch
import ciphertune
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import plugin_manager
from ciphertune.training.lora import add_lora

folder, to, tokens, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
loaded = ciphertune.load_client(folder, to)
model = add_lora(loaded, seed=0, rank=8, targets=["q_proj", "v_proj"])
session = ciphertune.session_of(model)
model.config.use_cache = False
row = min(256, tokens)
ids = torch.randint(model.config.vocab_size, (tokens // row, row), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
seconds, losses, traffic = [], [], []
for _ in range(steps):
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
    losses.append(float(loss.detach()))
    traffic.append([session.traffic.bytes_up, session.traffic.bytes_down])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
set_up = vars(session.set_up)
session.close()
print(json.dumps({"seconds": seconds, "losses": losses, "traffic": traffic, "peak": peak, "set_up": set_up}))
"""


def write_weights(shape: str, folder: Path) -> int:
    """Write random bfloat16 weights of a known shape, a shard a layer, and return their bytes."""
    model: Any = skeleton(shape)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name.replace(".", "-")
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = parameter
    total = 0
    for file, parameters in shards.items():
        drawn = {}
        for name, parameter in parameters.items():
            value = torch.ones(parameter.shape, dtype=torch.bfloat16)
            if parameter.dim() > 1:
                value.normal_(0, 0.02, generator=generator)
            drawn[name] = value
            total += value.nbytes
        save_file(drawn, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(drawn, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def peak_of(process: int) -> int:
    """Peak of a process's resident memory so far, bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(shape: str, tokens: int, steps: int, options: str, base: Path) -> dict[str, Any]:
    to, load = "mlwe+zmq://", os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        plan = make_plan(shape, to, tokens=tokens, bandwidth=1e12, latency=0.0, processors="one")
        weights = 2 * (plan.outsourced + plan.at_client)
        need, free = 2 * weights + plan.prepared_bytes, shutil.disk_usage(folder).free
        if need > free:
            raise ConfigError(
                f"{shape} needs {need / 1e9:.0f} GB of disk in {base}, which has {free / 1e9:.0f} GB left"
            )
        begun = time.perf_counter()
        (folder / "model").mkdir()
        write_weights(shape, folder / "model")
        split(str(folder / "model"), folder / "bundle", calibration="off")
        shutil.rmtree(folder / "model")
        made = time.perf_counter() - begun
        here = ZmqTransport.loopback(folder, {})
        with worker_process(folder / "bundle" / "worker", "zmq", here.address, here.serve) as (address, worker):
            given = "&".join([*(f"{key}={value}" for key, value in here.connect.items()), "timeout=600", options])
            arguments = [str(folder / "bundle" / "client"), f"{to}{address}?{given}", str(tokens), str(steps)]
            environment = {**os.environ, "CIPHERTUNE_CACHE": str(folder / "cache")}
            command = [sys.executable, "-c", _CLIENT, *arguments]
            run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if run.returncode:
                raise SystemExit(run.stderr[-3000:])
            found = json.loads(run.stdout.splitlines()[-1])
            worker_peak = peak_of(worker)
    up, down = (found["traffic"][-1][i] - (found["traffic"][-2][i] if steps > 1 else 0) for i in (0, 1))
    return {
        "machine": machine(load),
        "shape": shape,
        "tokens": tokens,
        "options": options,
        "outsourced_weights": plan.outsourced,
        "split_s": made,
        "set_up": found["set_up"],
        "step_s": statistics.median(found["seconds"][1:] or found["seconds"]),
        "all_steps_s": found["seconds"],
        "planned_step_s": None if plan.estimate is None else plan.estimate.total,
        "losses": found["losses"],
        "client_peak": found["peak"],
        "worker_peak": worker_peak,
        "bytes_up": up,
        "bytes_down": down,
        "planned_up": plan.bytes_up,
        "planned_down": plan.bytes_down,
        "prepared_bytes": plan.prepared_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(BUILT_IN))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--options", default="hint_memory=512", help="of mlwe, as in a selection string")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="add the figures to scale.json")
    arguments = parser.parse_args()
    found = measure(arguments.shape, arguments.tokens, arguments.steps, arguments.options, arguments.folder)
    print(json.dumps(found, indent=2))
    if arguments.keep:
        path = HERE / "scale.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        kept = [row for row in kept if (row["shape"], row["tokens"]) != (found["shape"], found["tokens"])]
        path.write_text(json.dumps([*kept, found], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
