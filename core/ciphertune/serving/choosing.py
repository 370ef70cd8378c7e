"""The next token of one answer, chosen from the model's logits."""

from __future__ import annotations

import collections
import dataclasses
import secrets
from typing import Any

import torch
from torch import Tensor

from ciphertune.serving.requests import Sampling


@dataclasses.dataclass(frozen=True)
class LogProbabilities:
    """Log-probabilities at one place of an answer, at the precision of bfloat16.

    Attributes:
        token: the chosen token, and ``value`` its log-probability.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


class Chooser:
    """Chooses the tokens of one answer.

    Warpers are those of transformers. Log-probabilities are of the model's own distribution, before any of them. They
    are rounded to bfloat16: who knows what a mask hides must not see exact values of what was computed under it.

    Args:
        sampling: what the request says.
        defaults: the model's ``GenerationConfig``, for what it does not say.
        prompt: tokens before the answer, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, defaults: Any, prompt: list[int]) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        drawn = bool(getattr(defaults, "do_sample", False))

        def setting(name: str, otherwise: Any) -> Any:
            own = getattr(sampling, name)
            theirs = getattr(defaults, name, None)
            return own if own is not None else theirs if theirs is not None else otherwise

        temperature = setting("temperature", 1.0) if drawn or sampling.temperature is not None else 0.0
        penalty = setting("repetition_penalty", 1.0)
        top_k, top_p = setting("top_k", 0), setting("top_p", 1.0)
        self._penalties = LogitsProcessorList()
        if penalty != 1.0:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        self._warpers = LogitsProcessorList()
        self._greedy = temperature == 0 or top_p == 0
        if not self._greedy:
            if temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(float(temperature)))
            if top_k:
                self._warpers.append(TopKLogitsWarper(int(top_k)))
            if top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._sampling = sampling
        self._counts: collections.Counter[int] = collections.Counter()
        self._tokens = torch.tensor([prompt], dtype=torch.long)
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    def choose(self, logits: Tensor) -> tuple[int, LogProbabilities | None]:
        """The next token, and its log-probabilities if they were asked for.

        Args:
            logits: (vocabulary,), float32, on the CPU; they are changed.
        """
        sampling = self._sampling
        likely = None if sampling.top_logprobs is None else torch.log_softmax(logits, 0)
        if sampling.frequency_penalty or sampling.presence_penalty:
            for token, count in self._counts.items():
                logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        for token, bias in sampling.logit_bias.items():
            if token < len(logits):
                logits[token] += bias
        scores = self._penalties(self._tokens, logits[None])
        if self._greedy:
            token = int(scores[0].argmax())
        else:
            chances = torch.softmax(self._warpers(self._tokens, scores)[0], 0)
            token = int(torch.multinomial(chances, 1, generator=self._generator))
        self._counts[token] += 1
        if self._penalties:
            self._tokens = torch.cat([self._tokens, torch.tensor([[token]])], dim=1)
        return token, None if likely is None else self._told(token, likely)

    def _told(self, token: int, likely: Tensor) -> LogProbabilities:
        count = min(self._sampling.top_logprobs or 0, len(likely))
        places = torch.topk(likely, count).indices.tolist()
        # JSON has no infinity.
        rounded = likely.to(torch.bfloat16).to(torch.float32).clamp_min(-9999.0)
        return LogProbabilities(token, float(rounded[token]), tuple((i, float(rounded[i])) for i in places))
