"""Tensors of a model out of a checkpoint that has them under other names, or in other pieces."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass
class _Recipe:
    """How tensors of the model are made of some of the checkpoint.

    Attributes:
        name: of the first of them.
        converter: transformers' rule, None where the name alone differs.
        sources: names in the checkpoint, each with the pattern of the rule that it matched.
    """

    name: str
    converter: Any
    sources: list[tuple[str, str | None]]


class Renaming:
    """What transformers does to a checkpoint when it loads it, for one tensor at a time.

    transformers 5 renames, fuses and cuts tensors by rules for each kind of model; earlier releases have no rules.

    Args:
        model: made from the checkpoint's configuration, without weights.
        stored: names of the checkpoint's tensors.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str]) -> None:
        self._model = model
        self._recipes: dict[str, _Recipe] = {}
        self._made: tuple[_Recipe, dict[str, Tensor]] | None = None
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
        except ImportError:
            return
        if not hasattr(model, "base_model_prefix"):
            return  # of another library
        rules = get_model_conversion_mapping(model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        expected: dict[str, Any] = model.state_dict()
        prefix = getattr(model, "base_model_prefix", "")
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected:
                continue
            converter: Any = None if pattern is None else by_pattern[pattern]
            recipe = self._recipes.setdefault(target, _Recipe(target, converter, []))
            recipe.sources.append((name, pattern))
            for other in () if converter is None else converter.target_patterns[1:]:
                self._recipes.setdefault(target.replace(converter.target_patterns[0], other, 1), recipe)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def sources(self, name: str) -> list[str]:
        """Names in the checkpoint of what a tensor of the model is made of."""
        return [source for source, _ in self._recipes[name].sources]

    def only_renamed(self, name: str) -> str | None:
        """The name in the checkpoint of a tensor that is the same there but for its name; None if it is not."""
        recipe = self._recipes.get(name)
        return None if recipe is None or recipe.converter is not None else recipe.sources[0][0]

    def make(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the model.

        Args:
            name: in the model.
            read: gives a tensor of the checkpoint by its name there.
        """
        recipe = self._recipes[name]
        if recipe.converter is None:
            return read(recipe.sources[0][0])
        if self._made is None or self._made[0] is not recipe:
            converter = copy.deepcopy(recipe.converter)
            for source, pattern in recipe.sources:
                converter.add_tensor(recipe.name, source, pattern, lambda source=source: read(source))
            made = converter.convert(recipe.name, model=self._model, config=self._model.config)
            # Those of one rule are asked for one after the other, so that the last one's are all that is kept.
            self._made = recipe, {key: each[0] if isinstance(each, list) else each for key, each in made.items()}
        return self._made[1][name]
