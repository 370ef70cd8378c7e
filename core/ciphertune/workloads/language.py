"""SmolLM2-135M on the Python language reference: a language model and a text, both from packages."""

from __future__ import annotations

import math
from typing import Any

import torch

from ciphertune.errors import ConfigError
from ciphertune.models.load import SMOLLM2_FILE, load_causal_model, smollm2_folder
from ciphertune.training.lora import add_lora
from ciphertune.workloads.texts import batches_of, language_reference, row_length, rows_of
from ciphertune.workloads.workload import Question, Workload

_QUESTION = "What does the with statement of Python do?"
_ANSWER_TOKENS = 16


def smollm2(*, batches: int, tokens: int, held_out: int, seed: int, rank: int) -> Workload:
    """Load the workload ``smollm2``: LoRA on q and v of all 30 layers, articles in an order drawn from the seed."""
    length = row_length(tokens)
    size = tokens // length
    folder = smollm2_folder()
    base, tokenizer = load_causal_model(str(folder), SMOLLM2_FILE)
    base.config.use_cache = False
    articles = list(language_reference().values())
    held_texts, train_texts = articles[::7], [text for i, text in enumerate(articles) if i % 7]
    order = torch.randperm(len(train_texts), generator=torch.Generator().manual_seed(seed)).tolist()
    train = rows_of([train_texts[i] for i in order], tokenizer, length)
    held = rows_of(held_texts, tokenizer, length)
    if len(train) < batches * size or len(held) < held_out * size:
        raise ConfigError(f"the text gives {len(train)} rows of {length} tokens: ask for fewer steps or tokens")
    model = add_lora(base, seed=seed, rank=rank, targets=["q_proj", "v_proj"])
    # Held-out rows evenly spread, so that few of them still see many articles.
    picked = held[torch.linspace(0, len(held) - 1, held_out * size).long()]
    return Workload(
        name="SmolLM2-135M-Instruct",
        data="the Python language reference (causal language modelling)",
        model=model,
        train=batches_of(train[: batches * size], size),
        held_out=batches_of(picked, size),
        loss_fn=None,
        metric=("perplexity", lambda model, data, metrics: math.exp(metrics["eval_loss"])),
        learning_rate=2e-3,
        unit="tokens",
        question=Question(_QUESTION, lambda model: _answer(model, tokenizer)),
    )


def _answer(model: Any, tokenizer: Any) -> str:
    """The beginning of an answer."""
    asked = [{"role": "user", "content": _QUESTION}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=_ANSWER_TOKENS, do_sample=False, use_cache=True)
    finally:
        model.train(training)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
