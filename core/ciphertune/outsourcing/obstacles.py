"""Why a linear layer cannot be outsourced."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ciphertune.outsourcing.probe import is_plain_linear_map
from ciphertune.outsourcing.stacked import Layout
from ciphertune.outsourcing.walk import peft_types

_REPLACED = "its forward was replaced on this instance, as accelerate's hooks do: remove the hook first"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer with its weight stored as (in, out)."""
    utilities = sys.modules.get("transformers.pytorch_utils")
    return utilities is not None and isinstance(module, utilities.Conv1D)


def obstacle(module: nn.Module, parent: nn.Module, mixed: bool, allow_meta: bool) -> str | None:
    """Why a layer cannot be outsourced, None if it can.

    Args:
        module: an ``nn.Linear`` or a ``Conv1D``, or of a class derived from one of them.
        parent: what it hangs in.
        mixed: whether the model has trainable and frozen parameters, so that the trainable ones are meant to be.
        allow_meta: take layers without weights, on the meta device, as well.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention computes with its weights directly"
    found = something_of_its_own(module)
    if found is not None:
        return found
    weight: Any = module._parameters["weight"]
    if is_lazy(weight):
        return "it is lazy and has no size yet: call the model once first"
    transposed = is_conv1d(module)
    base = sys.modules["transformers.pytorch_utils"].Conv1D if transposed else nn.Linear
    if type(module) is not base and not is_plain_linear_map(module, transposed=transposed):
        return f"{type(module).__name__} is a linear layer with a behaviour of its own"
    if (found := weight_obstacle(weight, mixed, allow_meta)) is not None:
        return found
    return "its weight is empty" if weight.numel() == 0 else None


def weight_obstacle(weight: Tensor, mixed: bool, allow_meta: bool) -> str | None:
    """Why a weight cannot go to workers, whatever layer it is of, None if it can; see ``obstacle``."""
    if weight.is_meta and not allow_meta:
        return "its weight is on the meta device: load the model first"
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"its weight has dtype {weight.dtype}"
    if mixed and weight.requires_grad:
        return "its weight is being trained, so it has to stay here: freeze it first"
    return None


def stacked_obstacle(module: nn.Module, parent: nn.Module, layout: Layout, mixed: bool, allow_meta: bool) -> str | None:
    """Why a module of experts with stacked weights cannot be outsourced, None if it can; see ``obstacle``."""
    if isinstance(parent, peft_types()[0]):
        return "peft trains adapters of the experts' parameters, which are added to the weights before each call"
    if "forward" in vars(module):
        return _REPLACED
    for path in layout.parameters:
        holder = module.get_submodule(path.rpartition(".")[0])
        weight = holder._parameters.get(path.rpartition(".")[2])
        if weight is None:
            return f"its parameter {path} is computed from others"
        if (found := weight_obstacle(weight, mixed, allow_meta)) is not None:
            return found
    return None


def something_of_its_own(module: nn.Module) -> str | None:
    """What a layer has that an outsourced one would lose."""
    if "forward" in vars(module):
        return _REPLACED
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    if "weight" not in names:
        return (
            "its weight is computed from other tensors before each call (weight_norm, spectral_norm, pruning, another "
            "parametrization): remove that first"
        )
    others = [*(names - {"weight", "bias"}), *module._buffers, *module._modules]
    if others or ("bias" not in names and module.bias is not None):
        return f"it has tensors beside weight and bias, or computes its bias: {', '.join(sorted(others)) or 'bias'}"
    return None
