"""The autograd functions of all outsourced products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ciphertune._support.denormals import flushing
from ciphertune._support.finite import all_finite, zeroed
from ciphertune._support.torch_compat import batched_by_autograd, rows_of_all, uncompiled, without_autocast
from ciphertune.callers import Owners
from ciphertune.client.session import Session
from ciphertune.errors import InputError
from ciphertune.outsourcing.outliers import add_inputs, add_outputs, set_inputs_aside, set_outputs_aside
from ciphertune.weights import MOST_CHANNELS


class OutsourcedProduct(torch.autograd.Function):
    """``x Wᵀ`` for every layer of a group, differentiable in x as often as asked.

    Forward takes x of shape (tokens, K), float32, and gives one (tokens, N) tensor per layer. Backward is
    ``OutsourcedGradient`` of the output gradients; forward-mode derivatives are the same product of the tangent. Under
    ``vmap`` the rows of all examples are those of one product.

    Rows that hold NaN or infinity give NaN, as in the clear, where nothing may read them; zeros are sent for them.
    """

    @staticmethod
    def forward(
        x: Tensor, session: Session, group: int, half: bool, owners: Owners | None = None
    ) -> tuple[Tensor, ...]:
        """See the class; ``half`` as in ``OutsourcedGradient``, ``owners`` as in ``Session.product``."""
        if batched_by_autograd(x):
            found: tuple[Tensor, ...] = rows_of_all(
                lambda rows: OutsourcedProduct.forward(rows, session, group, half, None), x
            )
            return found
        # A backward pass started under autocast runs under it too, and may come back here.
        layers = session.members(group)
        # What is set aside counts as many multiply-adds as any operation here.
        width = max(sum(layer.out_features for layer in layers), x.shape[1])
        with flushing(MOST_CHANNELS * width * x.shape[0]), without_autocast(x.device.type):
            finite, overflown = _finite_rows(x)
            sent, aside = set_inputs_aside(finite, layers)
            stacked = session.product(group, "forward", sent, owners, finite=True)
            outputs = []
            row = 0
            for layer in layers:
                part = stacked[:, row : row + layer.out_features]
                row += layer.out_features
                # Products may come in any order of their values; one pass puts them in order and applies the scale.
                output = torch.empty(part.shape, dtype=torch.float32, device=part.device)
                if layer.scale is None:
                    output.copy_(part)
                else:
                    torch.mul(part, layer.scale.to(output.device), out=output)
                output = add_inputs(output, aside, layer)
                outputs.append(output if overflown is None else output.masked_fill_(overflown, torch.nan))
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what ``backward`` and ``jvp`` need."""
        x, ctx.session, ctx.group, ctx.half, ctx.owners = inputs
        ctx.tokens = len(x)
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Any:
        """The tangents of the outputs."""
        if tangent is None:
            return (None,) * len(ctx.session.members(ctx.group))
        return OutsourcedProduct.apply(tangent, ctx.session, ctx.group, ctx.half, ctx.owners)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *others: Any) -> tuple[Any, Any]:
        """One product for the rows of all examples."""
        session, group, half, owners = others
        if owners is not None:
            raise InputError("rows of several callers cannot be told apart under vmap: call the model without it")
        batched = x.movedim(in_dims[0], 0)
        outputs = OutsourcedProduct.apply(batched.flatten(0, 1), session, group, half, None)  # type: ignore[no-untyped-call]
        return tuple(y.reshape(*batched.shape[:2], -1) for y in outputs), (0,) * len(outputs)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        """See the class."""
        if not ctx.needs_input_grad[0] or all(grad is None for grad in grads):
            return None, None, None, None, None
        gradient: Tensor = OutsourcedGradient.apply(  # type: ignore[no-untyped-call]
            ctx.session, ctx.group, ctx.half, ctx.tokens, *grads
        )
        return gradient, None, None, None, None


class OutsourcedGradient(torch.autograd.Function):
    """``Σ g W`` over the layers of a group: the gradient of ``OutsourcedProduct``, differentiable in every g.

    Forward sends one product for all layers: the stacked output gradients, with the per-channel scales folded in,
    times the stacked integer weight, so that the same codes serve both directions and the worker sums over the layers.
    A gradient that is None counts as zeros. Backward is ``OutsourcedProduct`` again.

    With ``half``, gradients of float16 outputs may have overflowed, as they do by design under a gradient scaler: zeros
    are sent for such rows, and their gradient is NaN, as it would be in the clear, so that the scaler skips the step.
    """

    @staticmethod
    def forward(session: Session, group: int, half: bool, tokens: int, *grads: Tensor | None) -> Tensor:
        """See the class; each of ``grads`` is (tokens, N) of its layer, float32, or None."""
        if batched_by_autograd(*grads):

            def of_rows(*rows: Tensor | None) -> Tensor:
                count = next(len(each) for each in rows if each is not None)
                return OutsourcedGradient.forward(session, group, half, count, *rows)

            found: Tensor = rows_of_all(of_rows, *grads)
            return found
        layers = session.members(group)
        device = next(grad.device for grad in grads if grad is not None)
        width = sum(layer.out_features for layer in layers)
        with flushing(), without_autocast(device.type):
            stacked = torch.empty(tokens, width, dtype=torch.float32, device=device)
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
            if not half:
                product = session.product(group, "backward", set_outputs_aside(stacked, layers))
                return add_outputs(product, grads, layers).contiguous()
            # Zeros are sent in their place: how many rows overflowed must not show in what is sent, nor in when.
            finite, overflown = zeroed(stacked)
            sent = set_outputs_aside(finite, layers)
            product = add_outputs(session.product(group, "backward", sent, finite=True), grads, layers)
            return torch.where(overflown, torch.nan, product).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what ``backward`` and ``jvp`` need."""
        ctx.session, ctx.group, ctx.half, ctx.tokens = inputs[:4]
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        """The tangent of the gradient."""
        if all(tangent is None for tangent in tangents[4:]):
            return None
        gradient: Tensor = OutsourcedGradient.apply(  # type: ignore[no-untyped-call]
            ctx.session, ctx.group, ctx.half, ctx.tokens, *tangents[4:]
        )
        return gradient

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """One product for the rows of all examples."""
        session, group, half, tokens, *grads = inputs
        rows = [
            None if grad is None else _batched(grad, at, info.batch_size)
            for grad, at in zip(grads, in_dims[4:], strict=True)
        ]
        gradient: Tensor = OutsourcedGradient.apply(  # type: ignore[no-untyped-call]
            session, group, half, tokens * info.batch_size, *rows
        )
        return gradient.reshape(info.batch_size, tokens, -1), 0

    @staticmethod
    @uncompiled
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the class."""
        needed = ctx.needs_input_grad[4:]
        if grad is None or not any(needed):
            return (None,) * (4 + len(needed))
        outputs = OutsourcedProduct.apply(grad, ctx.session, ctx.group, ctx.half, None)  # type: ignore[no-untyped-call]
        return (None,) * 4 + tuple(y if wanted else None for y, wanted in zip(outputs, needed, strict=True))


def _finite_rows(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is sent of an input, (tokens, K), and which rows are not finite, (tokens, 1); None where all are.

    Without such rows nothing is copied, which is nearly always. A copy may show in the time before a request; without
    it the run would end there, which shows more.
    """
    return (x, None) if x.shape[0] == 0 or all_finite(x) else zeroed(x)


def _batched(grad: Tensor, at: int | None, batch: int) -> Tensor:
    """Gradients of all examples, one behind the other, (batch · tokens, N)."""
    moved = grad.expand(batch, *grad.shape) if at is None else grad.movedim(at, 0)
    return moved.flatten(0, 1)
