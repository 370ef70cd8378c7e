"""Models without weights, to plan with: the built-in ones by name, and those that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError
from ciphertune.models.folders import refuse_folder
from ciphertune.models.hub import found_at
from ciphertune.models.names import refuse_path
from ciphertune.models.skeleton import assemble, build

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "dtype": "bfloat16",
}

_LLAMA_3_2 = {**_LLAMA_3, "tie_word_embeddings": True}

BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {**_LLAMA_3_2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "llama-3.2-3b": {
        **_LLAMA_3_2,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "llama-3-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Models by name: what their public ``config.json`` says of their sizes; of Llama's architecture, or ``model_type``."""


def skeleton(model: str, **changes: Any) -> nn.Module:
    """A model whose parameters take no memory.

    Args:
        model: one of ``BUILT_IN``, a folder with a ``config.json``, or a hub name.
        changes: attributes of its configuration to set first.

    Raises:
        ConfigError: it is none of these, or its configuration cannot be read.
    """
    if model in BUILT_IN:
        transformers = import_optional("transformers", 'pip install "ciphertune[hf]"')
        said = {**BUILT_IN[model], **changes}
        kind = said.pop("model_type", "llama").capitalize()
        config = getattr(transformers, f"{kind}Config")(**said)
        return assemble(config, getattr(transformers, f"{kind}ForCausalLM"))
    refuse_path(model, ("smollm2", *BUILT_IN))
    folder = Path(found_at(model))
    if not folder.is_dir():
        refuse_folder(model, weights=False)
        try:
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(model, "config.json")).parent
        except Exception as error:
            known = ", ".join(BUILT_IN)
            raise ConfigError(
                f"{model!r} is neither a folder, nor one of {known}, nor a model that the hub gives: {error}"
            ) from error
    return build(folder, **changes)
