"""The autograd functions of products with the experts of a mixture, of which each token uses some."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ciphertune._support.denormals import flushing
from ciphertune._support.torch_compat import uncompiled, without_autocast
from ciphertune.callers import Owners
from ciphertune.client.session import Session


@dataclasses.dataclass(frozen=True)
class Stack:
    """A session's group of layers that are the same parts of all experts.

    Attributes:
        session: the open session.
        group: index of the group.
        parameters: P, parameters that its layers are of; layers stand by parameter, then by expert.
        experts: E.
        width: output features of each layer, N.
        half: whether gradients may have overflowed, as those of float16 outputs do under a gradient scaler.
    """

    session: Session
    group: int
    parameters: int
    experts: int
    width: int
    half: bool

    def scale(self, device: torch.device) -> Tensor | None:
        """Scales of the layers' outputs, (P, E, N); None for float32 weights."""
        scales = [layer.scale for layer in self.session.members(self.group)]
        if any(scale is None for scale in scales):
            return None
        whole = torch.cat([scale for scale in scales if scale is not None])
        return whole.to(device).view(self.parameters, self.experts, self.width)


class FromInputs(torch.autograd.Function):
    """Outputs of the experts that each token uses, of one product with all experts.

    Forward takes x of shape (tokens, K), float32, and the experts' numbers, (tokens, k). Every token is sent to every
    expert; of the outputs those of the token's own are picked, (tokens, k, P · N). Backward is ``FromOutputs``. Both
    are differentiable as often as asked.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chosen: Tensor, stack: Stack, lenient: bool = False, owners: Owners | None = None
    ) -> Tensor:
        """See the class.

        Args:
            ctx: of autograd.
            x: (tokens, K).
            chosen: (tokens, k) int64, below E.
            stack: of the layers.
            lenient: whether rows that are not finite are sent as zeros, and their outputs are NaN.
            owners: as in ``Session.product``.
        """
        ctx.stack = stack
        ctx.save_for_backward(chosen)
        ctx.set_materialize_grads(False)
        with flushing(), without_autocast(x.device.type):
            sent, overflown = _finite(x, lenient)
            stacked = stack.session.product(stack.group, "forward", sent, owners)
            wide: Tensor = stacked.unflatten(1, (stack.parameters, stack.experts, stack.width))  # type: ignore[no-untyped-call]
            rows = torch.arange(len(x), device=x.device)[:, None]
            picked = wide[rows, :, chosen.to(wide.device)].to(torch.float32)
            scale = stack.scale(picked.device)
            if scale is not None:
                picked = picked * scale[:, chosen].permute(1, 2, 0, 3)
            return _marked(picked.flatten(2), overflown)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the class."""
        (chosen,) = ctx.saved_tensors
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        gradient: Tensor = FromOutputs.apply(grad, chosen, ctx.stack, ctx.stack.half)  # type: ignore[no-untyped-call]
        return gradient, None, None, None, None


class FromOutputs(torch.autograd.Function):
    """``Σ h W`` over the experts that each token uses, of one product with all experts.

    Forward takes h of shape (tokens, k, P · N), float32, one row for each expert that the token uses, and gives
    (tokens, K). For experts that a token does not use zeros are sent, which no worker can tell from other values.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, chosen: Tensor, stack: Stack, lenient: bool = False, owners: Owners | None = None
    ) -> Tensor:
        """See the class and ``FromInputs.forward``."""
        ctx.stack = stack
        ctx.save_for_backward(chosen)
        ctx.set_materialize_grads(False)
        with flushing(), without_autocast(h.device.type):
            finite, overflown = _finite(h.flatten(1), lenient)
            values = finite.view(len(h), chosen.shape[1], stack.parameters, stack.width)
            scale = stack.scale(h.device)
            if scale is not None:
                values = values * scale[:, chosen].permute(1, 2, 0, 3)
            wide = torch.zeros(len(h), stack.parameters, stack.experts, stack.width, device=h.device)
            rows = torch.arange(len(h), device=h.device)[:, None]
            wide.transpose(1, 2).index_put_((rows, chosen), values, accumulate=True)
            product = stack.session.product(stack.group, "backward", wide.flatten(1), owners)
            return _marked(product.to(torch.float32).contiguous(), overflown)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the class."""
        (chosen,) = ctx.saved_tensors
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        gradient: Tensor = FromInputs.apply(grad, chosen, ctx.stack, ctx.stack.half)  # type: ignore[no-untyped-call]
        return gradient, None, None, None, None


def _finite(x: Tensor, lenient: bool) -> tuple[Tensor, Tensor | None]:
    """What is sent, and which rows were not finite; how many these are must not show in what is sent, nor in when."""
    if not lenient:
        return x, None
    overflown = ~x.isfinite().all(dim=1)
    return x.masked_fill(overflown[:, None], 0.0), overflown


def _marked(y: Tensor, overflown: Tensor | None) -> Tensor:
    if overflown is None:
        return y
    return torch.where(overflown.view(-1, *(1,) * (y.dim() - 1)), torch.nan, y)
