"""Keys and values of a conversation's tokens, kept between its turns."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ciphertune._support.optional_imports import import_optional

_MOVING = ("dynamic", "longrope")
"""Rotary embeddings whose angles change with the length of the whole text."""


class KeptCache:
    """The cache of one text that grows, so that a pass over it sends what is new alone. It belongs to one conversation.

    A prompt takes it as far as their tokens agree; what the cache holds beyond is cut off. Nothing is kept where that
    would not give the keys and values that a new cache gets: other caches than transformers' growing one, such as those
    of state-space models, and rotary embeddings that depend on the length.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tokens: list[int] = []
        self._cache: Any = None
        config = model.config.get_text_config()
        own = model.generation_config
        supported = getattr(model, "_supports_default_dynamic_cache", lambda: False)
        self._possible = bool(
            supported()
            and not model.config.is_encoder_decoder
            and own.use_cache is not False
            and own.cache_implementation is None
            and not _mentions(getattr(config, "rope_parameters", None), _MOVING)
            and not _mentions(getattr(config, "rope_scaling", None), _MOVING)
            and _grows(self._new())
        )

    @property
    def tokens(self) -> int:
        """Tokens that it holds."""
        return len(self._tokens)

    def drop(self) -> None:
        """Forget all of it."""
        self._tokens, self._cache = [], None

    def take(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments for ``generate`` over a prompt of these tokens. Nothing is held until ``keep``."""
        if not self._possible:
            return {}
        cache, held = self._cache, self._tokens
        self.drop()  # A pass that fails leaves a cache of which nobody knows what is in it.
        # The last token has to be computed: its logits are what is asked for.
        pairs = zip(held, prompt[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if cache is None or same == 0 or (same < len(held) and not _can_be_cut(cache)):
            cache = self._new()
        elif same < len(held):
            cache.crop(same - len(held))
        # Releases of transformers call it by one name or the other.
        name = "cache" if "cache" in inspect.signature(self._model.forward).parameters else "past_key_values"
        return {name: cache}

    def keep(self, taken: Mapping[str, Any], tokens: Sequence[int]) -> None:
        """Hold what a call of ``generate`` with ``taken`` left.

        Args:
            taken: of ``take``.
            tokens: the prompt and what was generated; the last of them was not computed.
        """
        for cache in taken.values():
            length = cache.get_seq_length()
            if 0 < length < len(tokens):
                self._cache, self._tokens = cache, list(tokens[:length])

    def _new(self) -> Any:
        transformers = import_optional("transformers", 'pip install "ciphertune[hf]"')
        return transformers.DynamicCache(config=self._model.config.get_text_config(decoder=True))


def _grows(cache: Any) -> bool:
    """Whether each layer takes further tokens at any time, as if all of them had come at once."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _can_be_cut(cache: Any) -> bool:
    """Whether every layer holds all tokens; one with a window has lost the early ones."""
    return not any(layer.is_sliding for layer in cache.layers)


def _mentions(value: Any, words: Iterable[str]) -> bool:
    if isinstance(value, Mapping):
        return any(_mentions(each, words) for each in value.values())
    return isinstance(value, str) and value in words
