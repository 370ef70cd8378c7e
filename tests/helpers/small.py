"""Transformers models of a few thousand weights, of any kind."""

from __future__ import annotations

from typing import Any

import torch

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def config(kind: str, **changes: Any) -> Any:
    """A small configuration of a kind ("Llama", "Bert" …) that takes the usual names of sizes."""
    import transformers

    return getattr(transformers, f"{kind}Config")(**(COMMON | changes))


def model(name: str, **changes: Any) -> Any:
    """A small model by the name of its class, the same at every call, in evaluation mode."""
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(config(cls.config_class.__name__.removesuffix("Config"), **changes)).eval()


def ids(rows: int = 2, length: int = 8) -> torch.Tensor:
    """Token ids, the same at every call."""
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(1))
