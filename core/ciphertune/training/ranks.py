"""AdaLoRA's division of ranks among layers, which peft leaves to the training loop.

Zhang et al.: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv:2303.10512. What the
division goes by (how important each rank has been so far) is part of a checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ciphertune.training.adapter import is_peft

_IMPORTANCE = ("exp_avg_ipt", "exp_avg_unc")


def divide_ranks(model: nn.Module, step: int) -> None:
    """Divide the ranks anew after an optimizer step, with its gradients still there; nothing for other adapters.

    Args:
        model: that is trained.
        step: number of the step, from 1.
    """
    found = _adalora(model)
    if found is not None:
        found.update_and_allocate(step)


def ranks_state(model: nn.Module) -> dict[str, Any] | None:
    """What the division goes by, for a checkpoint; None for other adapters."""
    found = _adalora(model)
    if found is None:
        return None
    kept = {name: dict(getattr(found.rankallocator, name)) for name in _IMPORTANCE}
    return {**kept, "pattern": _config(found).rank_pattern}


def check_ranks(model: nn.Module, state: Any) -> None:
    """Raise ``ValueError`` or ``TypeError`` where a checkpoint's state is none for this model."""
    found = _adalora(model)
    if found is None or state is None:
        if (found is None) != (state is None):
            raise ValueError("one of the runs is of AdaLoRA, and the other is not")
        return
    sizes = {name: parameter.shape for name, parameter in found.model.named_parameters()}
    for kind in _IMPORTANCE:
        for name, tensor in state[kind].items():
            if not isinstance(tensor, Tensor) or sizes.get(name) != tensor.shape:
                raise ValueError(f"the importance of {name} is of another shape")
    if not isinstance(state["pattern"], dict | None):
        raise TypeError("the pattern of ranks is none")


def restore_ranks(model: nn.Module, state: Any) -> None:
    """Go on from what ``check_ranks`` has passed."""
    found = _adalora(model)
    if found is None:
        return
    for kind in _IMPORTANCE:
        setattr(found.rankallocator, kind, dict(state[kind]))
    _config(found).rank_pattern = state["pattern"]


def _adalora(model: Any) -> Any:
    """Peft's AdaLoRA within a model, None where there is none that is trained."""
    if not is_peft(model):
        return None
    base = model.base_model
    trained = getattr(base, "trainable_adapter_name", None)
    return base if trained is not None and hasattr(base, "update_and_allocate") else None


def _config(adalora: Any) -> Any:
    return adalora.peft_config[adalora.trainable_adapter_name]
