"""Codes of a checkpoint as codes of a worker."""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune.weights import LayerWeight, quantize


def adopt(codes: Tensor, scale: Tensor) -> LayerWeight | None:
    """Codes that were made elsewhere, unchanged; but rows with -128, which codes here do not have, are rounded again.

    Args:
        codes: (N, K) int8.
        scale: (N,) float32.

    Returns:
        The weight; None where a scale is negative or not finite.
    """
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        return None
    codes, scale = codes.clone(), scale.clone()
    wide = codes.amin(dim=1) == -128
    if bool(wide.any()):
        again = quantize(codes[wide].float() * scale[wide, None], 8)
        assert again.scale is not None
        codes[wide], scale[wide] = again.codes, again.scale
    return LayerWeight(codes, scale)
