"""How answers are generated, by the names that transformers has for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ciphertune._support.ranges import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Range, check_fields
from ciphertune.errors import ConfigError

_SHARE = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Options of ``generate``. None is what the model's own generation configuration says.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        do_sample: whether tokens are drawn, in place of the most probable one; implied by the next three.
        temperature: divides the logits before tokens are drawn.
        top_p: tokens are drawn from the most probable ones that have this probability together.
        top_k: tokens are drawn from so many of the most probable ones.
        num_beams: beams of a beam search.
        repetition_penalty: divides the logits of tokens that occurred.
        prompt_lookup_num_tokens: tokens to guess at once from what stands in the prompt, checked in one pass.
        seed: of what is drawn.
        pad_tokens: pad prompts to a multiple of so many tokens.
        fixed_length: generate ``max_new_tokens`` tokens whenever the answer ends.

    Raises:
        ConfigError: a value is out of its range, or two of them exclude each other.
    """

    max_new_tokens: int = 256
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int | None = None
    repetition_penalty: float | None = None
    prompt_lookup_num_tokens: int | None = None
    seed: int | None = None
    pad_tokens: int = 1
    fixed_length: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            ConfigError,
            max_new_tokens=AT_LEAST_ONE,
            temperature=POSITIVE,
            top_p=_SHARE,
            top_k=AT_LEAST_ONE,
            num_beams=AT_LEAST_ONE,
            repetition_penalty=POSITIVE,
            prompt_lookup_num_tokens=AT_LEAST_ONE,
            seed=NOT_NEGATIVE,
            pad_tokens=AT_LEAST_ONE,
        )
        drawn = [name for name in _SAMPLING if getattr(self, name) is not None]
        if drawn and self.do_sample is False:
            raise ConfigError(f"{drawn[0]} is for drawn tokens, and do_sample is false: leave one of them out")
        if self.beams and self.prompt_lookup_num_tokens is not None:
            raise ConfigError("prompt_lookup_num_tokens and num_beams exclude each other: leave one out")
        if self.fixed_length and (self.beams or self.prompt_lookup_num_tokens is not None):
            raise ConfigError(
                "fixed_length is for one token at a time: how long beams are searched for, and how many guessed tokens "
                "are right, depends on the text, and workers would see it. Leave num_beams and "
                "prompt_lookup_num_tokens out"
            )

    @property
    def beams(self) -> bool:
        """Whether several beams are searched."""
        return (self.num_beams or 1) > 1

    @property
    def samples(self) -> bool | None:
        """Whether tokens are drawn; None where the model's own configuration decides."""
        drawn = any(getattr(self, name) is not None for name in _SAMPLING)
        return True if drawn else self.do_sample

    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``generate`` of transformers."""
        names = (*_SAMPLING, "num_beams", "repetition_penalty", "prompt_lookup_num_tokens")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.samples is False:
            # A model's own, which transformers would warn of.
            found |= dict.fromkeys(_SAMPLING)
        return found if self.samples is None else {**found, "do_sample": self.samples}
