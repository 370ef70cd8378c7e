"""A tiny model that answers, a server in front of it, and the openai client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
import torch

import ciphertune
from ciphertune.serving.choosing import Chooser
from ciphertune.serving.server import Server
from ciphertune.serving.settings import ServeSettings


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of letters, with a chat template."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("letters")
    tiny.save_letters(folder)
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = tiny.TEMPLATE
    found.backend_tokenizer.decoder = decoders.Fuse()
    return found


@pytest.fixture
def letters() -> Callable[..., Any]:
    """``letters(**changes)``: a Llama of the same weights at every call, for the tokenizer of letters."""

    def make(**changes: Any) -> Any:
        torch.manual_seed(3)
        sizes = {"vocab_size": 97, "max_position_embeddings": 256, "eos_token_id": 96, **changes}
        model = tiny.llama(**sizes).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def serve(tokenizer: Any, letters: Callable[..., Any]) -> Iterator[Callable[..., Server]]:
    """``serve(to, **settings)``: a server of the tiny model, closed at the end."""
    servers: list[Server] = []
    models: list[Any] = []

    def start(to: str | None = "clear", model: Any = None, **settings: Any) -> Server:
        made = letters() if model is None else model
        if to is not None:
            ciphertune.outsource(made, to=to)
            models.append(made)
        server = Server("tiny", made, tokenizer, ServeSettings(port=0, **{"max_new_tokens": 32, **settings}))
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()
    for made in models:
        ciphertune.session_of(made).close()


@pytest.fixture
def client() -> Iterator[Callable[..., openai.OpenAI]]:
    """``client(server, key)``: the openai client of a server."""
    clients: list[openai.OpenAI] = []

    def make(server: Server, key: str = "none") -> openai.OpenAI:
        clients.append(openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=60))
        return clients[-1]

    yield make
    for each in clients:
        each.close()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``script(text)``: what every answer is from now on, a letter each token, to its end."""

    def follow(text: str) -> None:
        tokens = [*(ord(letter) - 32 for letter in text), 96]
        monkeypatch.setattr(Chooser, "__init__", lambda self, *_: setattr(self, "left", list(tokens)))
        monkeypatch.setattr(Chooser, "choose", lambda self, logits: (self.left.pop(0), None))

    return follow
