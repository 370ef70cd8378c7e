"""The one autograd function of all outsourced products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ciphertune._support.torch_compat import uncompiled
from ciphertune.client.session import Session


class OutsourcedProduct(torch.autograd.Function):
    """``x Wᵀ`` for every layer of a group, differentiable in x.

    Forward takes x of shape (tokens, K), float32, and gives one (tokens, N) tensor per layer. Backward sends one
    product for all of them: the stacked output gradients, with the per-channel scales folded in, times the stacked
    integer weight, so that the same codes serve both directions and the worker sums over the layers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, session: Session, group: int) -> tuple[Tensor, ...]:
        """See the class."""
        ctx.session, ctx.group, ctx.tokens = session, group, len(x)
        ctx.set_materialize_grads(False)
        stacked = session.product(group, "forward", x)
        outputs = []
        row = 0
        for layer in session.members(group):
            part = stacked[:, row : row + layer.out_features]
            row += layer.out_features
            # Products come feature-major; one copy puts them in order, and the scale is applied in place.
            output = torch.empty(part.shape, dtype=torch.float32, device=part.device).copy_(part)
            outputs.append(output if layer.scale is None else output.mul_(layer.scale.to(output.device)))
        return tuple(outputs)

    @staticmethod
    @uncompiled
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """See the class."""
        if not ctx.needs_input_grad[0] or all(grad is None for grad in grads):
            return None, None, None
        layers = ctx.session.members(ctx.group)
        device = next(grad.device for grad in grads if grad is not None)
        width = sum(layer.out_features for layer in layers)
        stacked = torch.empty(ctx.tokens, width, dtype=torch.float32, device=device)
        column = 0
        for layer, grad in zip(layers, grads, strict=True):
            part = stacked[:, column : column + layer.out_features]
            column += layer.out_features
            if grad is None:
                part.zero_()
            elif layer.scale is None:
                part.copy_(grad)
            else:
                torch.mul(grad, layer.scale.to(device), out=part)
        return ctx.session.product(ctx.group, "backward", stacked).contiguous(), None, None
