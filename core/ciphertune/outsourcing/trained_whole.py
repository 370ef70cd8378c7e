"""A guard: peft trains modules whole (``modules_to_save``, heads of a task), which needs their weights here."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ciphertune._support.absent_tensor import WithoutWeight
from ciphertune.errors import OutsourcedWeightError
from ciphertune.outsourcing.walk import peft_types


@functools.cache
def guard() -> None:
    """From now on, refuse with ``OutsourcedWeightError`` what would train the bias of an outsourced layer and no more.

    peft trains a copy of a module, in which the weight would be as absent as in the original, and saves it.
    """
    register_module_module_registration_hook(_refuse)


def _refuse(parent: nn.Module, attribute: str, module: nn.Module | None) -> None:
    if module is None or not isinstance(parent, peft_types()[1]):
        return
    absent = [each.name for each in module.modules() if isinstance(each, WithoutWeight)]
    if absent:
        raise OutsourcedWeightError(
            f"peft is to train {', '.join(map(repr, absent))} whole (modules_to_save, or the head of its task type), "
            "but the weight is at the workers. Load the model again, and outsource it without that layer "
            "(layers=…), or leave the layer out of modules_to_save"
        )
