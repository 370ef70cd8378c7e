"""Answers as the protocol writes them: whole, and piece by piece."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from ciphertune.serving.choosing import LogProbabilities


class Reply:
    """The documents of one request.

    Args:
        kind: ``chat.completion`` or ``text_completion``.
        model: the name that was asked for.
        tokenizer: of transformers, for the text of single tokens.
    """

    def __init__(self, kind: str, model: str, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat = kind == "chat.completion"
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The document of all answers."""
        return {**self._head, "choices": list(choices), "usage": usage}

    def choice(
        self,
        index: int,
        message: dict[str, Any],
        likely: Sequence[LogProbabilities] | None,
        reason: str,
    ) -> dict[str, Any]:
        """One whole answer.

        Args:
            index: its place.
            message: ``content``, and ``tool_calls`` if it has some.
            likely: log-probabilities of its tokens; None if they were not asked for.
            reason: why it ended.
        """
        found: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self._likely(likely)}
        if self.chat:
            return {**found, "message": {"role": "assistant", "refusal": None, **message}}
        return {**found, "text": message["content"]}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        likely: Sequence[LogProbabilities] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """A piece of one answer; see ``choice``."""
        found: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self._likely(likely)}
        found |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return self._part([found])

    def counts(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece: the numbers of tokens."""
        return {**self._part([]), "usage": usage}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self._head["object"]
        return {**self._head, "object": kind, "choices": choices}

    def _likely(self, likely: Sequence[LogProbabilities] | None) -> dict[str, Any] | None:
        if likely is None:
            return None
        if self.chat:
            places = [{**self._told(p.token, p.value), "top_logprobs": [self._told(*t) for t in p.top]} for p in likely]
            return {"content": places, "refusal": None}
        texts = [self._text(place.token) for place in likely]
        return {
            "tokens": texts,
            "token_logprobs": [place.value for place in likely],
            "top_logprobs": [{self._text(token): value for token, value in place.top} for place in likely],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _told(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        found: str = self._tokenizer.decode([token])
        return found


def usage(prompt: int, answers: int) -> dict[str, int]:
    """The numbers of tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def tool_calls(calls: Sequence[Any]) -> list[dict[str, Any]]:
    """Calls as the protocol writes them: arguments are JSON in a text."""
    found = []
    for call in calls:
        function = call["function"]
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        found.append(
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": str(function["name"]), "arguments": text},
            }
        )
    return found
