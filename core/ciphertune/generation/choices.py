"""Questions with several answers to choose from: read, and answered by the answers' likelihoods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciphertune.data.files import check_letters, named
from ciphertune.data.render import IGNORED, Tokens
from ciphertune.data.rows import Row, rows_of_file
from ciphertune.data.sequences import Collator, padding
from ciphertune.errors import ConfigError, NonFiniteLossError
from ciphertune.generation.opening import OpenedModel
from ciphertune.generation.prompts import Prompt, checked, conversation, encode
from ciphertune.training.inference import evaluating

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        place: where it stands, for messages.
        question: its text.
        choices: two answers or more.
        answer: number of the right one.
    """

    place: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of questions whose right answer is the most likely.

    Attributes:
        questions: number of them.
        accuracy: by log-likelihood.
        accuracy_norm: by log-likelihood divided by the answer's letters, which is fair to long ones; as ``acc_norm`` of
            lm-evaluation-harness.
    """

    questions: int
    accuracy: float
    accuracy_norm: float


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of rows, each with ``question``, ``choices`` and ``answer``.

    ``answer`` is the number of the right choice from 0, its letter, or its text.

    Raises:
        ConfigError: the file cannot be read, or a row is no question. Nothing of it is quoted but names of fields.
    """
    try:
        rows = rows_of_file(path)
    except OSError as error:
        raise ConfigError(f"cannot read the questions in {path}: {error.strerror or error}") from error
    if not rows:
        raise ConfigError(f"{path} holds no question")
    return [_question(row) for row in rows]


def _question(row: Row) -> Question:
    question, choices, right = (row.fields.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{row.place}: 'question' must be a text; it has {named(row.fields)}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ConfigError(f"{row.place}: 'choices' must be a list of two texts or more, none of them empty")
    for text in (question, *choices):
        check_letters(text, row.place)
    number: int | None = None
    if isinstance(right, int) and not isinstance(right, bool):
        number = right
    elif right in choices:
        number = choices.index(right)
    elif isinstance(right, str) and right.strip() and right.strip().upper() in _LETTERS:
        number = _LETTERS.index(right.strip().upper())
    if number is None or not 0 <= number < len(choices):
        raise ConfigError(
            f"{row.place}: 'answer' must be the number of the right choice from 0, its letter, or its text"
        )
    return Question(row.place, question, tuple(choices), number)


def render(opened: OpenedModel, question: Question, chat: bool) -> list[Tokens]:
    """A sequence for each choice, of which the choice's own tokens are labelled.

    Args:
        opened: the model.
        question: with its choices.
        chat: write the question as a user's message by the chat template.

    Raises:
        ConfigError: it does not fit the model.
    """
    asked = Prompt(question.place, question.question)
    prompt = encode(opened, conversation(asked) if chat else asked)
    space = "" if chat or question.question[-1:].isspace() else " "
    found = []
    for choice in question.choices:
        if chat:
            answer: list[int] = opened.tokenizer(choice, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [*prompt, *answer]
            begin = len(prompt)
        else:
            ids = opened.tokenizer(question.question + space + choice, verbose=False)["input_ids"]
            # Tokens may merge where the question ends.
            pairs = zip(prompt, ids, strict=False)
            begin = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(ids) - 1))
        ids = checked(opened, ids, question.place)
        begin = max(begin, 1)  # Nothing predicts the first token.
        found.append(Tokens(ids, [IGNORED] * begin + ids[begin:]))
    return found


def measure_accuracy(
    opened: OpenedModel, questions: Sequence[Question], *, batch_size: int, pad_tokens: int, chat: bool
) -> Accuracy:
    """Answer questions by likelihood.

    Args:
        opened: the model.
        questions: what to answer.
        batch_size: choices evaluated together.
        pad_tokens: pad them to a multiple of so many tokens.
        chat: as for ``render``.

    Raises:
        ConfigError: a question does not fit the model. Nothing was sent.
        NonFiniteLossError: the model gave NaN or infinity.
    """
    rendered = [render(opened, question, chat) for question in questions]
    flat = [tokens for choices in rendered for tokens in choices]
    collate = Collator(padding(opened.tokenizer), pad_tokens)
    likelihoods: list[float] = []
    with evaluating(opened.model):
        for at in range(0, len(flat), batch_size):
            likelihoods += _likelihoods(opened.model, collate(flat[at : at + batch_size])).tolist()
    scores = iter(likelihoods)
    plain = normed = 0
    for question in questions:
        mine = list(_take(scores, len(question.choices)))
        lengths = [len(choice) for choice in question.choices]
        by_letter = [score / length for score, length in zip(mine, lengths, strict=True)]
        plain += mine.index(max(mine)) == question.answer
        normed += by_letter.index(max(by_letter)) == question.answer
    return Accuracy(len(questions), plain / len(questions), normed / len(questions))


def _take(values: Iterator[float], count: int) -> Iterator[float]:
    for _ in range(count):
        yield next(values)


def _likelihoods(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The log-likelihood of the labelled tokens of each row."""
    labels = batch["labels"][:, 1:]
    logits = model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        use_cache=False,
    ).logits
    logits = logits[:, :-1].float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteLossError("evaluation: the model's logits are not finite")
    each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    found: Tensor = each.masked_fill(labels == IGNORED, 0.0).sum(-1)
    return found
