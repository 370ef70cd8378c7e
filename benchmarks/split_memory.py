"""Memory that splitting takes, on a synthetic Llama of 1.5 billion weights written to disk in shards.

python benchmarks/split_memory.py [FOLDER]    needs about 5 GB of disk there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, WIDE, LAYERS, VOCABULARY, KEYS = 2048, 8192, 24, 32000, 512

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": KEYS * 32 // HIDDEN,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

_SPLIT = """
import json, sys, threading, time
from pathlib import Path
import torch, transformers, accelerate
import ciphertune
from ciphertune.plugins.manager import plugin_manager

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}

getattr(transformers, "LlamaForCausalLM"), plugin_manager()
before, most, done = memory(), {}, threading.Event()

def watch():
    while not done.is_set():
        for name, value in memory().items():
            most[name] = max(most.get(name, 0), value)
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
result = ciphertune.split(sys.argv[1], sys.argv[2], layers="all")
seconds = time.perf_counter() - start
done.set()
thread.join()
print(json.dumps({"seconds": seconds, "fraction": result.fraction, "client_bytes": result.client_bytes,
                  **{name: most[name] - before[name] for name in most}}))
"""


def write_model(folder: Path) -> int:
    """A random checkpoint, one file a layer, so that this takes little memory too; how many weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    table: dict[str, str] = {}
    count = 0

    def put(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(shapes, file))
        count += sum(tensor.numel() for tensor in tensors.values())

    put("embeddings.safetensors", {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    put("head.safetensors", {"lm_head.weight": (VOCABULARY, HIDDEN)})
    for i in range(LAYERS):
        names = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (WIDE, HIDDEN),
            "mlp.up_proj": (WIDE, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        put(f"layer-{i:02d}.safetensors", {f"model.layers.{i}.{n}.weight": shape for n, shape in names.items()})
    index = {"metadata": {"total_size": 2 * count}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def measured(folder: Path) -> dict[str, float]:
    """Weights of the model and of its largest block, and what splitting it takes; 5 GB of disk in ``folder``."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights = write_model(Path(scratch) / "model")
        command = [sys.executable, "-c", _SPLIT, f"{scratch}/model", f"{scratch}/bundle"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
    return {
        "weights": weights,
        "largest": max(2 * WIDE * HIDDEN, VOCABULARY * HIDDEN),
        "seconds": found["seconds"],
        "fraction": found["fraction"],
        "client_bytes": found["client_bytes"],
        "own_bytes": found["RssAnon"],
        "mapped_bytes": found["RssFile"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.gettempdir()))
    found = measured(parser.parse_args().folder)
    weights = found["weights"]
    print(f"{weights / 1e9:.2f} billion weights, {2 * weights / 1e9:.2f} GB on disk; {found['seconds']:.0f} s")
    print(
        f"outsourced: {100 * found['fraction']:.1f}% of the weights; the client's {found['client_bytes'] / 1e6:.0f} MB"
    )
    print(f"largest block: {found['largest'] / 1e6:.0f} million weights")
    print(f"memory above the start, peak: {found['own_bytes'] / 1e6:.0f} MB of its own, ", end="")
    print(f"{found['mapped_bytes'] / 1e6:.0f} MB of mapped file pages, which the system takes back when it needs them")


if __name__ == "__main__":
    main()
