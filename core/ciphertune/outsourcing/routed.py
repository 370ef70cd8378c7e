"""The autograd functions of products with the experts of a mixture, of which each token uses some."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ciphertune._support.denormals import flushing
from ciphertune._support.finite import zeroed
from ciphertune._support.torch_compat import batched_by_autograd, rows_of_all, uncompiled, without_autocast
from ciphertune.callers import Owners
from ciphertune.client.session import Session
from ciphertune.errors import InputError
from ciphertune.outsourcing.outliers import set_inputs_aside


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
    def forward(x: Tensor, chosen: Tensor, stack: Stack, lenient: bool = False, owners: Owners | None = None) -> Tensor:
        """See the class.

        Args:
            x: (tokens, K).
            chosen: (tokens, k) int64, below E.
            stack: of the layers.
            lenient: whether rows that are not finite are sent as zeros, and their outputs are NaN.
            owners: as in ``Session.product``.
        """
        if batched_by_autograd(x, chosen):
            found: Tensor = rows_of_all(lambda rows, of: FromInputs.forward(rows, of, stack, lenient), x, chosen)
            return found
        with flushing(), without_autocast(x.device.type):
            finite, overflown = _finite(x, lenient)
            layers = stack.session.members(stack.group)
            sent, aside = set_inputs_aside(finite, layers)
            stacked = stack.session.product(stack.group, "forward", sent, owners)
            wide: Tensor = stacked.unflatten(1, (stack.parameters, stack.experts, stack.width))  # type: ignore[no-untyped-call]
            rows = torch.arange(len(x), device=x.device)[:, None]
            picked = wide[rows, :, chosen.to(wide.device)].to(torch.float32)
            scale = stack.scale(picked.device)
            if scale is not None:
                picked = picked * scale[:, chosen].permute(1, 2, 0, 3)
            if aside is not None:
                # With all experts, as the product is: how long it takes must not follow from routing.
                columns = [layer.kept.column_values for layer in layers if layer.kept is not None]
                part = aside @ torch.cat(columns, dim=1).to(aside.device)
                shape = (stack.parameters, stack.experts, stack.width)
                picked = picked + part.unflatten(1, shape)[rows, :, chosen]  # type: ignore[no-untyped-call]
            return _marked(picked.flatten(2), overflown)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what ``backward`` and ``jvp`` need."""
        _keep(ctx, inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        """The tangent of the outputs."""
        return None if tangent is None else FromInputs.apply(tangent, *ctx.saved_tensors, ctx.stack, ctx.stack.half)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """One product for the rows of all examples."""
        return _of_all(FromInputs, info.batch_size, in_dims, inputs), 0

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
    def forward(h: Tensor, chosen: Tensor, stack: Stack, lenient: bool = False, owners: Owners | None = None) -> Tensor:
        """See the class and ``FromInputs.forward``."""
        if batched_by_autograd(h, chosen):
            found: Tensor = rows_of_all(lambda rows, of: FromOutputs.forward(rows, of, stack, lenient), h, chosen)
            return found
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
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what ``backward`` and ``jvp`` need."""
        _keep(ctx, inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        """The tangent of the outputs."""
        return None if tangent is None else FromOutputs.apply(tangent, *ctx.saved_tensors, ctx.stack, ctx.stack.half)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """One product for the rows of all examples."""
        return _of_all(FromOutputs, info.batch_size, in_dims, inputs), 0

    @staticmethod
    @uncompiled
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the class."""
        (chosen,) = ctx.saved_tensors
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        gradient: Tensor = FromInputs.apply(grad, chosen, ctx.stack, ctx.stack.half)  # type: ignore[no-untyped-call]
        return gradient, None, None, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, chosen, ctx.stack, *_ = inputs
    ctx.save_for_backward(chosen)
    ctx.save_for_forward(chosen)
    ctx.set_materialize_grads(False)


def _of_all(function: Any, batch: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> Tensor:
    """A function of tokens and experts' numbers, with the tokens of all examples one after the other."""
    stack, lenient, owners = inputs[2:]
    if owners is not None:
        raise InputError("tokens of several callers cannot be told apart under vmap: call the model without it")
    rows = [
        each.expand(batch, *each.shape) if at is None else each.movedim(at, 0)
        for each, at in zip(inputs[:2], in_dims[:2], strict=True)
    ]
    result: Tensor = function.apply(*(each.flatten(0, 1) for each in rows), stack, lenient, None)
    return result.unflatten(0, (batch, -1))  # type: ignore[no-untyped-call,no-any-return]


def _finite(x: Tensor, lenient: bool) -> tuple[Tensor, Tensor | None]:
    """What is sent, and which rows were not finite; how many these are must not show in what is sent, nor in when."""
    if not lenient:
        return x, None
    return zeroed(x)


def _marked(y: Tensor, overflown: Tensor | None) -> Tensor:
    if overflown is None:
        return y
    return torch.where(overflown.view(-1, *(1,) * (y.dim() - 1)), torch.nan, y)
