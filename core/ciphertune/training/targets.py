"""Layers that get adapters: by names, by what is usual for an architecture, or all that are linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError
from ciphertune.outsourcing.convert import outsourced_layers
from ciphertune.outsourcing.heads import outside_base_models
from ciphertune.outsourcing.layers import linear_layers

ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""In place of names: every linear layer but the output head and the heads of a task."""


def all_linear(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model that adapters are added to: no output head, no heads of a task.

    peft's own ``all-linear`` passes over outsourced layers.

    Raises:
        ConfigError: there is none.
    """
    outside = outside_base_models(model)
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        outside |= {id(getter())}
    modules = dict(model.named_modules())
    names = [c.name for c in linear_layers(model, allow_meta=True) if c.part is None] + [
        each.name for each in outsourced_layers(model)
    ]
    found = sorted(name for name in names if id(modules.get(name)) not in outside)
    if not found:
        raise ConfigError("target_modules: the model has no linear layer that could have an adapter")
    # The last parts of names say the same in short where no other module ends like them.
    ends = sorted({name.rpartition(".")[2] for name in found})
    meant = [name for name in modules if name.rpartition(".")[2] in ends]
    return ends if set(meant) == set(found) and not any(end.isdigit() for end in ends) else found


def usual(model: Any, known: dict[str, Any]) -> list[str] | str:
    """The targets that peft takes for a model's architecture; all linear layers where it has no opinion.

    Args:
        model: of transformers, or any other.
        known: names by type of model, as peft has them for a tuner.
    """
    names = known.get(getattr(getattr(model, "config", None), "model_type", ""))
    if not isinstance(names, list):
        return ALL_LINEAR
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return names if present.issuperset(names) else ALL_LINEAR


def check_targets(model: nn.Module, targets: Sequence[str], place: str) -> None:
    """Raise ``ConfigError`` for a name that no module with a weight has; ``place`` is the setting that holds it."""
    named = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in named):
            linear = {c.name.rpartition(".")[2] for c in linear_layers(model, allow_meta=True) if c.part is None}
            linear |= {layer.name.rpartition(".")[2] for layer in outsourced_layers(model)}
            raise ConfigError(f"{place}: no layer is called {target!r}; {closest(target, linear)}")
