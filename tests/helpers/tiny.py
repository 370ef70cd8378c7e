"""Tiny language models with random weights, and tokenizers for them: each kind once.

``model("llama")`` is what most tests take, also as ``tiny`` of ``conftest.py``; ``llama`` and its siblings take other
sizes. Weights come from torch's random generator: seed it first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEXT = "the worker sees only ciphertext and the client keeps every key and all of its data to itself today"
WORDS = TEXT.split()


def llama_config(**changes: Any) -> Any:
    """Of a Llama with two layers, hidden size 16, vocabulary 48, at most 16 positions, but for ``changes``."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def llama(**changes: Any) -> Any:
    """A model of ``llama_config``."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(**changes))


def gpt2(**changes: Any) -> Any:
    """The same sizes, where the linear layers are ``Conv1D``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 48, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))


def bert(**changes: Any) -> Any:
    """The same sizes, with a head of three classes."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, "num_labels": 3,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**sizes, **changes}))


KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "bert": bert,
}


def model(kind: str) -> nn.Module:
    """One of ``KINDS``, with the same weights at every call, in evaluation mode."""
    torch.manual_seed(7)
    made: nn.Module = KINDS[kind]().eval()
    for parameter in made.parameters():  # Biases start at zero and weights small, which hides mistakes.
        nn.init.normal_(parameter, std=0.3)
    return made


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template, of letters alone."""


def save_words(folder: Path) -> None:
    """A tokenizer with a token for each word of ``TEXT``."""
    from tokenizers import pre_tokenizers

    _save(folder, list(dict.fromkeys(["<unk>", "<end>", *WORDS])), pre_tokenizers.Whitespace())


def save_letters(folder: Path) -> None:
    """A tokenizer with a token for each printable character of ASCII; 97 tokens."""
    from tokenizers import pre_tokenizers

    _save(folder, [*map(chr, range(32, 127)), "<unk>", "<end>"], pre_tokenizers.Split("", "isolated"))


def save_talker(folder: Path) -> None:
    """Write a model with weights large enough to say different things, with letters as tokens and a chat template."""
    from transformers import AutoTokenizer

    torch.manual_seed(3)
    made = llama(vocab_size=97).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)
    save_letters(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def _save(folder: Path, tokens: list[str], splitter: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
