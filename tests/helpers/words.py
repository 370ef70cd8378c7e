"""A text of few words, and a tokenizer that has a token for each of them."""

from __future__ import annotations

from pathlib import Path

TEXT = "the worker sees only ciphertext and the client keeps every key and all of its data to itself today"
WORDS = TEXT.split()


def save_tokenizer(folder: Path) -> None:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<end>", *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
