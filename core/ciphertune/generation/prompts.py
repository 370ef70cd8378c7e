"""Prompts from texts, conversations and files, as tokens; what does not fit the model is refused here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciphertune.data.examples import Message, turns_in
from ciphertune.data.files import COLUMNAR, ROWS, check_letters, form, named, prose
from ciphertune.data.rows import Row, rows_of_file
from ciphertune.data.tables import rows_of_columns
from ciphertune.errors import ConfigError
from ciphertune.generation.opening import OpenedModel


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        place: where it stands, for messages.
        content: a text; or the turns of a conversation, which the model's chat template writes.
        tools: for the chat template.
    """

    place: str
    content: str | Sequence[Message]
    tools: Any = None


def conversation(prompt: Prompt) -> Prompt:
    """A text as the first message of a user; a conversation as it is."""
    if not isinstance(prompt.content, str):
        return prompt
    return dataclasses.replace(prompt, content=[{"role": "user", "content": prompt.content}])


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a file: one a line of a text, or one a row with a ``prompt``, ``messages`` or ``text``.

    Of ``messages`` the last answer is left out, so that a file to train with gives its questions. ``instruction`` with
    ``input`` is a user's message.

    Raises:
        ConfigError: it cannot be read, or holds no prompt. Nothing of it is quoted but names of fields.
    """
    try:
        if form(path) in (*ROWS, *COLUMNAR):
            rows = rows_of_columns(path) if form(path) in COLUMNAR else rows_of_file(path)
            found = [_of_row(row) for row in rows]
        else:
            lines = enumerate(prose(path).splitlines(), 1)
            found = [Prompt(f"line {number} of {path}", line) for number, line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error.strerror or error}") from error
    if not found:
        raise ConfigError(f"{path} holds no prompt")
    return found


def _of_row(row: Row) -> Prompt:
    fields = row.fields
    tools = fields.get("tools") or None
    if isinstance(fields.get("instruction"), str):
        more = fields.get("input")
        asked = fields["instruction"] + (f"\n\n{more}" if isinstance(more, str) and more else "")
        return conversation(Prompt(row.place, asked))
    for name in ("prompt", "messages", "conversations", "text"):
        value = fields.get(name)
        if isinstance(value, str) and name in ("prompt", "text"):
            check_letters(value, row.place)
            return Prompt(row.place, value)
        if value is not None and name != "text":
            turns = turns_in(value, row, name)
            if turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            return Prompt(row.place, turns, tools)
    raise ConfigError(f"{row.place} has {named(fields)}, and none of 'prompt', 'messages', 'instruction', 'text'")


def encode(opened: OpenedModel, prompt: Prompt) -> list[int]:
    """The tokens of a prompt, a conversation's with the beginning of an answer behind them.

    Raises:
        ConfigError: it is empty, longer than the model's positions, or has tokens that the model lacks; there is no
            chat template, or it refuses the conversation. Nothing of it is quoted.
    """
    if isinstance(prompt.content, str):
        if not prompt.content:
            raise ConfigError(f"{prompt.place} is empty")
        ids: list[int] = opened.tokenizer(prompt.content, verbose=False)["input_ids"]
    else:
        ids = _written(opened, prompt)
    return checked(opened, ids, prompt.place)


def checked(opened: OpenedModel, ids: list[int], place: str) -> list[int]:
    """Tokens that the model takes. Raises ``ConfigError`` for others, for none, and for too many."""
    if not ids:
        raise ConfigError(f"{place} is empty: the tokenizer makes no token of it")
    if max(ids) >= opened.vocabulary:
        raise ConfigError(
            f"{place}: the tokenizer gave token {max(ids)}, and {opened.source.name!r} has embeddings of "
            f"{opened.vocabulary} tokens: they are not of one model"
        )
    if opened.positions is not None and len(ids) > opened.positions:
        raise ConfigError(f"{place} has {len(ids)} tokens, and the model takes {opened.positions} at most: shorten it")
    return ids


def _written(opened: OpenedModel, prompt: Prompt) -> list[int]:
    refuse_no_template(opened)
    if not prompt.content:
        raise ConfigError(f"{prompt.place} holds no message to answer")
    try:
        found: list[int] = opened.tokenizer.apply_chat_template(
            list(prompt.content), tools=prompt.tools, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except Exception as error:
        # Of Jinja, and of whatever a template's own calls raise.
        raise ConfigError(f"{prompt.place}: the chat template refuses it: {error}") from error
    return found


def refuse_no_template(opened: OpenedModel) -> None:
    """Raise ``ConfigError`` for a tokenizer that cannot write conversations."""
    if not getattr(opened.tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer of {opened.source.name!r} has no chat template, which conversations are written by: take "
            "an instruction-tuned model, or name a Jinja file by --chat-template-path"
        )


def left_padded(rows: Sequence[Sequence[int]], pad: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Tokens with padding before them, and 1 where there is one of them and 0 elsewhere: (rows, length) int64 each."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
