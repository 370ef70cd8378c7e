"""Language models of a known shape or of a folder, on random tokens: to measure speed and memory, not to learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError
from ciphertune.models.known import BUILT_IN
from ciphertune.models.load import load_causal_model
from ciphertune.training.lora import add_lora
from ciphertune.workloads.texts import batches_of, row_length
from ciphertune.workloads.workload import Workload

_EXTRA = 'pip install "ciphertune[hf]"'


def is_shape(name: str) -> bool:
    """Whether the name is of a known shape or of a folder."""
    return name in BUILT_IN or Path(name).is_dir()


def base_model(name: str) -> nn.Module:
    """The model in float32: a folder's, or one of a known shape with weights that are the same each time.

    Raises:
        ConfigError: transformers is missing, or the folder holds no causal language model.
    """
    if name not in BUILT_IN:
        return load_causal_model(name)[0]  # type: ignore[no-any-return]
    transformers = import_optional("transformers", _EXTRA)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**BUILT_IN[name], "dtype": torch.float32})
        return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def random_tokens(name: str, *, batches: int, tokens: int, held_out: int, seed: int, rank: int) -> Workload:
    """Load a model with LoRA on its attention and batches of random tokens, in rows of 256 where there are more.

    Args:
        name: of a known shape, or a folder.
        batches: training batches.
        tokens: tokens in a batch.
        held_out: evaluation batches.
        seed: of the adapters' initial values and of the tokens.
        rank: of the adapters.

    Raises:
        ConfigError: as ``base_model``; tokens that do not fill rows; a model without text.
    """
    length = row_length(tokens)
    model: Any = base_model(name)
    model.config.use_cache = False
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(f"the configuration of {name!r} states no vocabulary, so no tokens can be drawn")
    rows = (batches + held_out) * (tokens // length)
    drawn = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    made = batches_of(drawn, tokens // length)
    return Workload(
        name=name if name in BUILT_IN else Path(name).name,
        data="random tokens",
        model=add_lora(model, seed=seed, rank=rank, targets=None),
        train=made[:batches],
        held_out=made[batches:],
        loss_fn=None,
        metric=("perplexity", lambda model, data, metrics: math.exp(metrics["eval_loss"])),
        learning_rate=1e-4,
        unit="tokens",
    )
