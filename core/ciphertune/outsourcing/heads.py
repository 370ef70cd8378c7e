"""Heads: what a task adds to a base model, small, new, and trained whole."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ciphertune.linear import OutsourcedLinear

# Where a transformers class has no base model apart, peft's task types still train these whole.
_TRAINED_BY_TASK = ("classifier", "score", "qa_outputs")


def transformers_models(module: nn.Module) -> list[Any]:
    """The outermost transformers models in a module, itself perhaps."""
    utilities = sys.modules.get("transformers.modeling_utils")
    if utilities is None:
        return []
    if isinstance(module, utilities.PreTrainedModel):
        return [module]
    found = [inner for child in module.children() for inner in transformers_models(child)]
    return list({id(model): model for model in found}.values())


def outside_base_models(model: nn.Module) -> set[int]:
    """Identities of the modules that lie outside of every base model; none where there is no transformers model.

    A transformers class for a task holds its base model under ``base_model_prefix``; beside that are its heads. So is
    what a module of one's own puts around a transformers model, unless that is most of its weights.
    """
    tasks = transformers_models(model)
    if not tasks:
        return set()
    inside: set[int] = set()
    for task in tasks:
        heads = [task._modules.get(name) for name in _TRAINED_BY_TASK] if task.base_model is task else []
        named = {id(module) for head in heads if head is not None for module in head.modules()}
        inside |= {id(module) for module in task.base_model.modules()} - named
    within = {id(module) for task in tasks for module in task.modules()}
    around = [module for module in model.modules() if id(module) not in within]
    outside = within - inside
    if _weights(around) < _weights([module for task in tasks for module in task.modules()]):
        outside |= {id(module) for module in around}
    return outside


def _weights(modules: list[nn.Module]) -> int:
    here = sum(p.numel() for module in modules for p in module._parameters.values() if p is not None)
    away = sum(m.in_features * m.out_features for m in modules if isinstance(m, OutsourcedLinear))
    return here + away
