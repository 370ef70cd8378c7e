"""Examples as tokens, with the labels that say which of them are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciphertune.data.examples import Example, Form, Message
from ciphertune.errors import ConfigError

IGNORED = -100
"""Label of a token that is not learned; the losses of torch and transformers skip it."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An example as a model takes it.

    Attributes:
        ids: its tokens.
        labels: the same, and ``IGNORED`` for those that are not learned.
    """

    ids: list[int]
    labels: list[int]


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text with the token for its end, if the tokenizer has one."""
    end = tokenizer.eos_token_id
    # Long texts are cut before or after, and a tokenizer warns about more than its model's context.
    found: list[int] = tokenizer(text, verbose=False)["input_ids"]
    # Some tokenizers add the end themselves.
    return found if end is None or found[-1:] == [end] else [*found, end]


def use_template(tokenizer: Any, path: str | None) -> None:
    """Give a tokenizer the chat template in a Jinja file. Raises ``ConfigError``."""
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"data.chat_template_path: cannot read {path}: {reason}") from error


_PROMPTS = ("completion", "instruction")
"""Forms that have a prompt."""


def check_loss(form: Form, completion_only: bool | None, assistant_only: bool) -> None:
    """Raise ``ConfigError`` where a form of examples has no part of the kind that alone is to be learned."""
    if completion_only and form not in _PROMPTS:
        raise ConfigError(
            f"data.completion_only_loss is for prompts with completions, and these are "
            f"{'conversations: set data.assistant_only_loss' if form == 'messages' else 'texts'}"
        )
    if assistant_only and form == "text":
        raise ConfigError("data.assistant_only_loss is for conversations, and these are texts")


class Renderer:
    """Makes tokens of examples, as TRL's ``SFTTrainer`` does.

    A prompt with its completion is learned from the completion alone, anything else whole, unless it is said otherwise.

    Args:
        tokenizer: of transformers; conversations need its chat template.
        form: of the examples.
        completion_only: learn completions alone; None for the default.
        assistant_only: learn the turns of the assistant alone.

    Attributes:
        moved: examples whose prompt has other tokens with the completion behind it than alone; the completion is
            learned from where they part.

    Raises:
        ConfigError: what is asked for does not fit the form, or there is no chat template.
    """

    def __init__(
        self, tokenizer: Any, form: Form, *, completion_only: bool | None = None, assistant_only: bool = False
    ) -> None:
        check_loss(form, completion_only, assistant_only)
        self.tokenizer = tokenizer
        self.completion_only = form in _PROMPTS if completion_only is None else completion_only
        self.assistant_only = assistant_only
        self.moved = 0

    def __call__(self, example: Example) -> Tokens:
        """The tokens of an example. Raises ``ConfigError`` where the chat template refuses it."""
        if isinstance(example.completion, str):
            return self._plain(example.prompt, example.completion)
        return self._conversation(example, example.completion)

    def _plain(self, prompt: Any, completion: str) -> Tokens:
        if self.assistant_only:
            raise ConfigError("data.assistant_only_loss is for conversations, and prompts and completions are texts")
        if prompt is None:
            ids = text_ids(completion, self.tokenizer)
            return Tokens(ids, ids)
        ids = text_ids(prompt + completion, self.tokenizer)
        return self._learned_after(self.tokenizer(prompt, verbose=False)["input_ids"], ids, ids)

    def _conversation(self, example: Example, completion: Sequence[Message]) -> Tokens:
        prompt: list[Message] = [turn for turn in example.prompt or () if not isinstance(turn, str)]
        turns: list[Message] = [*prompt, *completion]
        ids = self._template(turns, example, False)
        labels = self._assistant(turns, ids, example) if self.assistant_only else ids
        if not prompt or not self.completion_only:
            return Tokens(ids, labels)
        return self._learned_after(self._template(prompt, example, True), ids, labels)

    def _learned_after(self, prompt: list[int], ids: list[int], labels: list[int]) -> Tokens:
        if not self.completion_only:
            return Tokens(ids, labels)
        # Tokens may merge where the prompt ends, and a template may render a prompt alone in another way.
        length = _common(prompt, ids)
        self.moved += length < len(prompt)
        return Tokens(ids, [IGNORED] * length + labels[length:])

    def _assistant(self, turns: Sequence[Message], ids: list[int], example: Example) -> list[int]:
        labels = [IGNORED] * len(ids)
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._template(turns[:number], example, True) if number else []
            begin = _common(before, ids)
            end = _common(self._template(turns[: number + 1], example, False), ids)
            if begin < len(before) or end <= begin:
                raise ConfigError(
                    f"{example.place}: the chat template renders a conversation in another way when more turns follow, "
                    "so the assistant's tokens cannot be told: leave data.assistant_only_loss out, or give prompt and "
                    "completion"
                )
            labels[begin:end] = ids[begin:end]
        if all(label == IGNORED for label in labels):
            raise ConfigError(
                f"{example.place} has no turn of the assistant, which data.assistant_only_loss learns from"
            )
        return labels

    def _template(self, turns: Sequence[Message], example: Example, generation: bool) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "the model's tokenizer has no chat template, which conversations and instructions are written by: take "
                "an instruction-tuned model, or name a Jinja file in data.chat_template_path; texts, and prompts with "
                "completions that are texts, need none"
            )
        try:
            found: list[int] = self.tokenizer.apply_chat_template(
                list(turns), tools=example.tools, add_generation_prompt=generation, tokenize=True, return_dict=True
            )["input_ids"]
        except Exception as error:
            # Of Jinja, and of whatever a template's own calls raise.
            raise ConfigError(f"{example.place}: the chat template refuses it: {error}") from error
        return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    return next(
        (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
