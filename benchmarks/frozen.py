"""What a cache of frozen activations saves, with adapters in the upper quarter of a model's blocks, over three epochs.

``python benchmarks/frozen.py`` takes a minute on a quiet machine: it trains a small model of random weights with and
without ``frozen_cache``, and counts bytes and seconds by epoch. It writes ``frozen.json`` beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sweep import machine
from transformers import LlamaConfig, LlamaForCausalLM

import ciphertune
from ciphertune.hookspecs import hookimpl
from ciphertune.planning.plan import make_plan
from ciphertune.plugins.manager import PluginManager

HERE = Path(__file__).parent
SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS, TOKENS = 4, 64
"""Of a batch."""


def base(blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=blocks, **SIZES))


def train(arguments: Any, frozen_cache: int) -> dict[str, Any]:
    """Bytes and seconds of each epoch, and the losses."""
    first = arguments.blocks * 3 // 4
    lora = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(first, arguments.blocks))
    )
    model = ciphertune.outsource(get_peft_model(base(arguments.blocks), lora), arguments.to, plugins=PluginManager())
    drawn = torch.randint(512, (arguments.batches, ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "labels": ids} for ids in drawn]
    session, found = ciphertune.session_of(model), []
    trainer = ciphertune.LoraTrainer(model, epochs=arguments.epochs, frozen_cache=frozen_cache, plugins=PluginManager())
    marks = [(time.monotonic(), 0)]

    class Epochs:
        @hookimpl
        def ciphertune_training_step(self, step: int) -> None:
            if step % arguments.batches == 0:
                marks.append((time.monotonic(), session.traffic.bytes_up + session.traffic.bytes_down))

    trainer.plugins.register(Epochs())
    history = trainer.train(data)
    for (begun, before), (ended, after) in itertools.pairwise(marks):
        found.append({"seconds": ended - begun, "bytes": after - before})
    session.close()
    return {"epochs": found, "losses": history.losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="mlwe")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "frozen.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CIPHERTUNE_CACHE"] = f"{folder}/cache"
        base(arguments.blocks).save_pretrained(f"{folder}/model")
        plan = make_plan(
            f"{folder}/model", "mlwe", tokens=ROWS * TOKENS, first_block=arguments.blocks * 3 // 4, measure=False
        )
        without, kept = train(arguments, 0), train(arguments, 100)
    assert plan.later is not None
    steps = [plan.bytes_up + plan.bytes_down, *[plan.later.bytes_up + plan.later.bytes_down] * (arguments.epochs - 1)]
    told = [arguments.batches * step for step in steps]
    for number, (one, other, predicted) in enumerate(zip(without["epochs"], kept["epochs"], told, strict=True), 1):
        print(
            f"epoch {number}: {one['bytes'] / 1e6:.1f} MB and {one['seconds']:.1f} s without, "
            f"{other['bytes'] / 1e6:.1f} MB (planned {predicted / 1e6:.1f}) and {other['seconds']:.1f} s with the cache"
        )
    whole = [sum(each["bytes"] for each in run["epochs"]) for run in (without, kept)]
    apart = max(abs(a - b) for a, b in zip(without["losses"], kept["losses"], strict=True))
    print(f"{whole[1] / whole[0]:.2f} of the bytes over {arguments.epochs} epochs; losses at most {apart:.4f} apart")
    found = {"machine": machine(load), "blocks": arguments.blocks, "to": arguments.to, "without": without, "kept": kept}
    arguments.json.write_text(json.dumps({**found, "planned_bytes": told, "apart": apart}, indent=1) + "\n")


if __name__ == "__main__":
    main()
