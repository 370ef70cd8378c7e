"""Held-out loss of a trained adapter on the original model with stock peft, beside what the split model had.

python examples/held_out.py MODEL CONFIG
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from peft import PeftModel

from ciphertune import LoraTrainer
from ciphertune.models.load import load_named_model
from ciphertune.runs.config import load_config
from ciphertune.runs.language import LanguageTask


def main(name: str, path: Path) -> None:
    config = load_config(path)
    base, tokenizer = load_named_model(name)
    model = PeftModel.from_pretrained(base, Path(config.training.output) / "adapter", is_trainable=True)
    held = LanguageTask(config).batches(tokenizer).evaluation(config.data.batch_size) or []
    loss = LoraTrainer(model, require_outsourced=False).evaluate(held)["eval_loss"]
    split = json.loads((Path(config.training.output) / "result.json").read_text())["evaluations"][-1]["eval_loss"]
    print(f"held-out perplexity: {math.exp(loss):.3f} on the original model, {math.exp(split):.3f} through the workers")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
