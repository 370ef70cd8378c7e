"""A folder with a tiny model, a tokenizer of letters and a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    model = tiny.llama(vocab_size=97).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(made)
    tiny.save_letters(made)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    tokenizer.chat_template = tiny.TEMPLATE
    tokenizer.save_pretrained(made)
    return made
