"""The modules of a model by the names that they have without adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

_PEFT_PREFIX = "base_model.model."


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module but the model once, with its path, its parent and its attribute there.

    Below a peft adapter only the base layer, without the adapter in its path. What peft trains whole is left out.
    """
    peft_layer, peft_wrapper = peft_types()
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        if id(module) in seen or isinstance(module, peft_wrapper):
            return
        seen.add(id(module))
        # Not named_children, which names a module that hangs in two places of one parent only once.
        for attribute, child in module._modules.items():
            if child is None:
                continue
            if isinstance(module, peft_layer):
                if attribute != "base_layer":
                    continue
                child_path = path
            else:
                child_path = f"{path}.{attribute}" if path else attribute
            yield child_path, module, attribute, child
            yield from visit(child_path, child)

    yield from visit("", model)


def bare_name(model: nn.Module, path: str) -> str:
    """A path that ``walk`` gave, as it is in the model that peft wrapped."""
    return path.removeprefix(_PEFT_PREFIX) if hasattr(model, "peft_config") else path


def peft_types() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Peft's layers with adapters, and its wrappers of modules that are trained whole; empty where it is not loaded."""
    utilities = sys.modules.get("peft.tuners.tuners_utils")
    other = sys.modules.get("peft.utils.other")
    wrapper = getattr(other, "AuxiliaryTrainingWrapper", None) or getattr(other, "ModulesToSaveWrapper", None)
    return (utilities.BaseTunerLayer,) if utilities else (), (wrapper,) if wrapper else ()
