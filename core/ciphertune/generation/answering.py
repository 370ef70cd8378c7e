"""Answers to prompts by ``generate`` of transformers, with what they cost."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ciphertune._support.denormals import flushing
from ciphertune._support.optional_imports import import_optional
from ciphertune.data.sequences import padding
from ciphertune.errors import ConfigError
from ciphertune.generation.keeping import KeptCache
from ciphertune.generation.opening import OpenedModel
from ciphertune.generation.prompts import checked, left_padded
from ciphertune.generation.settings import GenerationSettings
from ciphertune.traffic import Traffic

_EXTRA = 'pip install "ciphertune[hf]"'


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens.
        prompt_tokens: tokens of the prompt, without padding.
        new_tokens: tokens of the answer, the one that ends it included.
        finish: ``stop`` where the model ended it, ``length`` where the limit did, ``interrupted`` where the user did.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: Literal["stop", "length", "interrupted"]


@dataclasses.dataclass
class Costs:
    """What answers cost: apart for prompts, up to the first new token, and for the new tokens after it.

    Attributes:
        prompt_tokens: tokens of the prompts, without padding.
        prompt_seconds: until the first new token.
        prompt_bytes_up: sent for them.
        prompt_bytes_down: received for them.
        new_tokens: tokens of all answers.
        seconds: from the first new token to the last.
        tokens_per_second: new tokens but the first of each answer over ``seconds``; None where there is no other.
        bytes_up: sent for new tokens.
        bytes_down: received for new tokens.
        passes: of the model over new tokens; each is one round trip for every group of layers.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    prompt_bytes_up: int = 0
    prompt_bytes_down: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    passes: int = 0

    def add(self, other: Costs) -> None:
        """Add the costs of further answers."""
        mine, theirs = ((c.tokens_per_second or 0.0) * c.seconds for c in (self, other))
        for field in dataclasses.fields(self):
            if field.name != "tokens_per_second":
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        self.tokens_per_second = (mine + theirs) / self.seconds if mine + theirs > 0 else None


@flushing()
def answer(
    opened: OpenedModel,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    *,
    draft: Any = None,
    on_text: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    kept: KeptCache | None = None,
) -> tuple[list[Answer], Costs]:
    """Generate an answer to each prompt, all of them together.

    Args:
        opened: the model.
        prompts: tokens of each.
        settings: how.
        draft: a model in the clear whose guesses are checked in one pass each, for one prompt; transformers'
            ``assistant_model``.
        on_text: called with each piece of text, for one prompt without beams.
        stop: ends the answers at the next token once it is set.
        kept: the cache of the conversation that one prompt continues. It is emptied where it cannot be used: for
            several prompts, padding, beams, a draft, prompt lookup.

    Raises:
        ConfigError: a prompt, or the settings, do not fit the model. Nothing was sent.
        CipherTuneError: a product could not be had.
    """
    rows = [checked(opened, list(ids), "the prompt") for ids in prompts]
    guesses = draft is not None or settings.prompt_lookup_num_tokens is not None
    if guesses and len(rows) > 1:
        raise ConfigError("a draft and prompt_lookup_num_tokens are for one prompt at a time: batch_size must be 1")
    if draft is not None and (settings.fixed_length or settings.beams):
        raise ConfigError("a draft cannot be used with fixed_length, nor with num_beams: leave one of them out")
    pad = padding(opened.tokenizer)
    ids, mask = left_padded(rows, pad, settings.pad_tokens)
    width = ids.shape[1]
    ends = _ends(opened)
    session = opened.session
    steps = _Steps(session.traffic, width, stop)
    extra: dict[str, Any] = {"max_new_tokens": _room(opened, width, settings), **settings.options()}
    extra["eos_token_id"] = None if settings.fixed_length or not ends else sorted(ends)
    if draft is not None:
        extra["assistant_model"] = draft
    if on_text is not None and not settings.beams and len(rows) == 1:
        extra["streamer"] = _Streamer(opened.tokenizer, on_text, ends)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    transformers = import_optional("transformers", _EXTRA)
    criteria = transformers.StoppingCriteriaList([steps])
    device = opened.model.device
    given = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    held: dict[str, Any] = {}
    if kept is not None and (guesses or settings.beams or settings.pad_tokens > 1 or len(rows) > 1):
        kept.drop()
    elif kept is not None:
        held = kept.take(rows[0])
    try:
        found = opened.model.generate(**given, **held, stopping_criteria=criteria, pad_token_id=pad, **extra)
    except (ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, ConfigError) or steps.begun:
            raise
        # Of transformers, about settings that do not go together.
        raise ConfigError(f"transformers refuses these settings: {' '.join(str(error).split())[:300]}") from error
    if kept is not None:
        kept.keep(held, found[0].tolist())
    interrupted = stop is not None and stop.is_set()
    answers = [
        _answer(opened, row, len(asked), ends, interrupted)
        for row, asked in zip(found[:, width:].tolist(), rows, strict=True)
    ]
    return answers, steps.costs(answers)


def _room(opened: OpenedModel, width: int, settings: GenerationSettings) -> int:
    """New tokens that the model has positions for. Padding counts, or the number would tell how much there is."""
    if opened.positions is None:
        return settings.max_new_tokens
    left = opened.positions - width
    if left < 1:
        raise ConfigError(
            f"the prompt fills {width} tokens, and the model takes {opened.positions} with the answer: shorten it"
            + ("" if settings.pad_tokens == 1 else ", or lower pad_tokens")
        )
    return min(settings.max_new_tokens, left)


def _ends(opened: OpenedModel) -> set[int]:
    """The tokens that end an answer."""
    found = getattr(opened.model.generation_config, "eos_token_id", None)
    if found is None:
        found = opened.tokenizer.eos_token_id
    return set() if found is None else {int(end) for end in (found if isinstance(found, (list, tuple)) else [found])}


def _answer(opened: OpenedModel, new: list[int], prompt_tokens: int, ends: set[int], interrupted: bool) -> Answer:
    at = next((number for number, token in enumerate(new) if token in ends), None)
    kept = new if at is None else new[: at + 1]
    text: str = opened.tokenizer.decode(kept, skip_special_tokens=True)
    finish: Literal["stop", "length", "interrupted"] = "stop"
    if at is None:
        finish = "interrupted" if interrupted else "length"
    return Answer(text, prompt_tokens, len(kept), finish)


class _Steps:
    """Called by transformers after each pass: takes the time and the traffic, and ends the answers when asked.

    Args:
        traffic: the session's.
        width: tokens of the prompts, padding included.
        stop: ends the answers once it is set.
    """

    def __init__(self, traffic: Traffic, width: int, stop: threading.Event | None) -> None:
        self._traffic = traffic
        self._width = width
        self._stop = stop
        self._calls = 0
        self._first = 0
        self._begin = self._prompted = (time.monotonic(), dataclasses.replace(traffic))

    @property
    def begun(self) -> bool:
        """Whether the prompts were sent."""
        return self._calls > 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._calls += 1
        if self._calls == 1:
            self._first = ids.shape[1] - self._width
            self._prompted = (time.monotonic(), dataclasses.replace(self._traffic))
        return torch.full((len(ids),), self._stop is not None and self._stop.is_set(), device=ids.device)

    def costs(self, answers: Sequence[Answer]) -> Costs:
        """The costs, at the end."""
        (begin, before), (prompted, at) = self._begin, self._prompted
        seconds = time.monotonic() - prompted
        prompt, new = at.since(before), self._traffic.since(at)
        later = sum(max(0, each.new_tokens - self._first) for each in answers)
        return Costs(
            prompt_tokens=sum(each.prompt_tokens for each in answers),
            prompt_seconds=prompted - begin,
            prompt_bytes_up=prompt.bytes_up,
            prompt_bytes_down=prompt.bytes_down,
            new_tokens=sum(each.new_tokens for each in answers),
            seconds=seconds,
            tokens_per_second=later / seconds if later > 0 and seconds > 0 else None,
            bytes_up=new.bytes_up,
            bytes_down=new.bytes_down,
            passes=self._calls - 1,
        )


class _Streamer:
    """Gives text as soon as it can no longer change; nothing behind the token that ends the answer.

    Args:
        tokenizer: of transformers.
        on_text: called with each piece.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], ends: set[int]) -> None:
        transformers = import_optional("transformers", _EXTRA)
        self._inner = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._inner.on_finalized_text = lambda text, stream_end=False: on_text(text) if text else None
        self._ends = ends
        self._prompt = True
        self._ended = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then new tokens."""
        if self._prompt:
            self._prompt = False
            self._inner.put(value)
            return
        for token in value.flatten():
            if not self._ended:
                self._inner.put(token[None])
                self._ended = int(token) in self._ends

    def end(self) -> None:
        """Give what is left."""
        self._inner.end()
