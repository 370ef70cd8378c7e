"""What workers hold of a workload's model."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_of(model: str | nn.Module) -> str | nn.Module:
    """Find what to split for the workers of a workload.

    Args:
        model: a workload's name, as ``load_workload`` takes it, or a module.

    Returns:
        The model without adapters, for ``ciphertune.split``: a module, or a name that ``split`` reads by itself.
    """
    if isinstance(model, str) and model not in ("smollm2", "mlp"):
        from ciphertune.workloads.shapes import base_model

        return base_model(model)
    if model != "mlp":
        return model
    # Its weights come from a short training, always the same.
    from ciphertune.workloads.named import load_workload

    adapted: Any = load_workload("mlp", batches=1, tokens=1, held_out=1).model
    base: nn.Module = adapted.unload()
    return base
