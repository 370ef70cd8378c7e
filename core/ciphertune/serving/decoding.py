"""Answers generated together, a token each at a time. They join and leave between steps."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ciphertune.callers import batch_of
from ciphertune.errors import ConfigError, SecurityError
from ciphertune.serving.answers import Answer


class Decoder:
    """One batch of answers and its cache of keys and values.

    Prompts are padded on the left. transformers' ``generate`` computes a batch as it began to its end; here an answer
    that has ended leaves, so that nothing more is sent for it, and one that waits joins, where the cache holds keys and
    values of every position (``DynamicLayer``). With another cache, of a sliding window or of a recurrent model, the
    batch is computed to its end.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        filler: token of padded places.
        pad_tokens: prompts are sent as a multiple of this number of tokens.
        apart: whether the session keeps callers apart, and wants to know whose the rows are.

    Attributes:
        answers: those under way.
        mixes: whether a batch may hold answers of several callers. A model whose layers get tokens in another order
            than that of the batch cannot tell whose they are.

    Raises:
        ConfigError: the model keeps no such cache.
    """

    def __init__(self, model: Any, filler: int, pad_tokens: int = 1, *, apart: bool = False) -> None:
        self.answers: list[Answer] = []
        self._model = model
        self._filler = filler
        self._pad = pad_tokens
        self._apart = apart
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config = base.config.get_text_config(decoder=True)
        self._names = set(inspect.signature(base.forward).parameters)
        # transformers renamed it; a model of another kind, as a recurrent one, may call it otherwise.
        found = next((name for name in ("cache", "past_key_values") if name in self._names), None)
        if found is None:
            raise ConfigError(
                f"{type(base).__name__} keeps no cache of keys and values, so the server cannot compute its answers"
            )
        self._cache_name = found
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self._mask = torch.empty(0, 0, dtype=torch.long)
        self._last: dict[Answer, int] = {}
        self.mixes = not apart or self._tells_rows_apart()

    @property
    def open(self) -> bool:
        """Whether answers may join those under way."""
        return not self.answers or _joins(self._cache)

    def join(self, answers: Sequence[Answer]) -> None:
        """Compute the prompts of some answers, and their first tokens.

        Raises:
            CipherTuneError: as ``Session.product``. The answers under way go on.
        """
        length = max(len(answer.prompt) for answer in answers)
        length = -(-length // self._pad) * self._pad
        ids = torch.full((len(answers), length), self._filler)
        mask = torch.zeros(len(answers), length, dtype=torch.long)
        for row, answer in enumerate(answers):
            ids[row, length - len(answer.prompt) :] = torch.tensor(answer.prompt)
            mask[row, length - len(answer.prompt) :] = 1
        cache = self._fresh_cache()
        logits = self._logits(ids, mask, cache, [answer.caller for answer in answers])
        if self.answers:
            self._cache, self._mask = _merged(self._cache, self._mask, cache, mask)
        else:
            self._cache, self._mask = cache, mask
        self.answers += answers
        self._choose(answers, logits)

    def step(self) -> None:
        """Compute the next token of every answer.

        Raises:
            CipherTuneError: as ``Session.product``; the cache is then of no use any more (``clear``).
        """
        self._release()
        if not self.answers:
            return
        ids = torch.tensor([[self._last[answer]] for answer in self.answers])
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        logits = self._logits(ids, self._mask, self._cache, [answer.caller for answer in self.answers])
        self._choose(self.answers, logits)

    def clear(self) -> None:
        """Forget all answers."""
        self.answers = []
        self._last.clear()
        self._cache = None

    def _choose(self, answers: Sequence[Answer], logits: Tensor) -> None:
        for answer, row in zip(answers, logits, strict=True):
            self._last[answer] = answer.take(row, self._filler)

    def _release(self) -> None:
        """Let go of answers that are complete; with a cache whose rows cannot be taken out, once all are."""
        leaving = [answer.leaves for answer in self.answers]
        if all(leaving):
            self.clear()
        elif any(leaving) and _joins(self._cache):
            kept = [row for row, gone in enumerate(leaving) if not gone]
            for answer, gone in zip(self.answers, leaving, strict=True):
                if gone:
                    del self._last[answer]
            self.answers = [self.answers[row] for row in kept]
            self._mask = self._mask[kept]
            # Places that are padding in every row that is left.
            first = int(self._mask.argmax(1).min())
            self._mask = self._mask[:, first:]
            for layer in self._cache.layers:
                layer.keys = layer.keys[kept, :, first:]
                layer.values = layer.values[kept, :, first:]

    def _logits(self, ids: Tensor, mask: Tensor, cache: Any, callers: Sequence[str]) -> Tensor:
        """Logits of the last place of each row, (batch, vocabulary) float32 on the CPU."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            self._cache_name: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        moved = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in given.items()
            if name in self._names
        }
        with torch.no_grad(), batch_of(callers) if self._apart else contextlib.nullcontext():
            logits: Tensor = self._model(**moved).logits[:, -1]
        return logits.to(device="cpu", dtype=torch.float32, copy=True)

    def _fresh_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def _tells_rows_apart(self) -> bool:
        """Whether every outsourced layer sees a batch in the order of its rows, tried with two callers."""
        ids = torch.full((2, 3), self._filler)
        try:
            self._logits(ids, torch.ones_like(ids), self._fresh_cache(), ["one", "other"])
        except SecurityError:
            return False
        return True


def _joins(cache: Any) -> bool:
    """Whether rows can be put into a cache and taken out of it."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _merged(cache: Any, mask: Tensor, other: Any, other_mask: Tensor) -> tuple[Any, Tensor]:
    """Two caches as one, the rows of the first above, and their mask; the shorter is padded on the left."""
    length = max(mask.shape[1], other_mask.shape[1])
    for layer, added in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat([_longer(layer.keys, length), _longer(added.keys, length)])
        layer.values = torch.cat([_longer(layer.values, length), _longer(added.values, length)])
    masks = [functional.pad(each, (length - each.shape[1], 0)) for each in (mask, other_mask)]
    return cache, torch.cat(masks)


def _longer(states: Tensor, length: int) -> Tensor:
    return functional.pad(states, (0, 0, length - states.shape[2], 0))
