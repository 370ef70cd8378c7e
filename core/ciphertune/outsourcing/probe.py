"""Trying out whether a layer of a derived class computes what its base class does."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn

_IN, _OUT = 7, 5
_SCALES = (1e-3, 1.0, 1e3)
"""Of the inputs: a class that clamps or rounds shows at one of them."""


def is_plain_linear_map(module: nn.Module, *, transposed: bool) -> bool:
    """Whether a layer computes ``x Wᵀ + b`` of its input alone, in training and in evaluation.

    A small stand-in of the layer, with the same attributes and with random weights, is called a few times. The layer
    itself is neither called nor changed.

    Args:
        module: with no tensors but ``weight`` and ``bias``.
        transposed: whether the weight is stored as (in, out).
    """
    forward = type(module).forward
    if type(module).__call__ is not nn.Module.__call__ or len(inspect.signature(forward).parameters) != 2:
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            return _agrees(_stand_in(module, transposed), forward, transposed)
    except Exception:
        # Whatever it needs beyond an input, an outsourced layer would not give.
        return False


def _agrees(layer: nn.Module, forward: object, transposed: bool) -> bool:
    assert callable(forward)
    weight = layer._parameters["weight"]
    assert weight is not None
    matrix = weight.t() if transposed else weight
    for training in (False, True):
        layer.train(training)
        for scale in _SCALES:
            x = torch.randn(2, 3, _IN, dtype=torch.float32, device="cpu") * scale
            for each in (x, x[0]):
                wanted = nn.functional.linear(each, matrix, layer._parameters["bias"])
                got = forward(layer, each)
                if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * scale):
                    return False
    return True


def _stand_in(module: nn.Module, transposed: bool) -> nn.Module:
    layer: nn.Module = object.__new__(type(module))
    nn.Module.__init__(layer)
    plain = {name: value for name, value in vars(module).items() if name not in vars(layer)}
    vars(layer).update(copy.deepcopy(plain))
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    vars(layer).update(zip(names, (_IN, _OUT), strict=True))
    shape = (_IN, _OUT) if transposed else (_OUT, _IN)
    weight = torch.randn(shape, dtype=torch.float32, device="cpu")
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    bias = torch.randn(_OUT, dtype=torch.float32, device="cpu")
    given = module._parameters.get("bias") is not None
    layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if given else None)
    return layer
