"""Layers that read the same input, evaluated as one product."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor

from ciphertune._support.torch_compat import in_forward_ad, transformed, uncompiled
from ciphertune.callers import Owners, owners_of
from ciphertune.client.session import Session
from ciphertune.errors import InputError, OutsourcedWeightError
from ciphertune.outsourcing.autograd import OutsourcedProduct
from ciphertune.outsourcing.holders import hold


@dataclasses.dataclass
class _Pending:
    """Outputs computed for siblings that have not asked yet, valid for one input tensor only."""

    source: weakref.ref[Tensor]
    version: int
    values: Tensor
    differentiable: bool
    inference: bool
    outputs: dict[int, Tensor]

    def belongs_to(self, x: Tensor) -> bool:
        if self.source() is not x or self.version != x._version:
            return False
        if (self.differentiable, self.inference) != (_differentiable(x), torch.is_inference_mode_enabled()):
            return False
        # A change through ``x.data`` moves no version: only the values tell.
        same_kind = (self.values.dtype, self.values.device, self.values.shape) == (x.dtype, x.device, x.shape)
        return same_kind and torch.equal(self.values, x.detach())


def _differentiable(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class LayerGroup:
    """A handle on one group of a session, shared by its layers.

    The first member asked with an input evaluates the whole group; its siblings, asked with the very same tensor,
    take their part. If a sibling turns up with another tensor, the layers do not share their input after all, and
    the group evaluates each alone from then on: the results are the same, only the saving is gone.

    Args:
        session: the open session.
        group: index of all members together in the session.
        singles: index of each member alone, in order; ``[group]`` for a group of one.
    """

    def __init__(self, session: Session, group: int, singles: list[int]) -> None:
        self.session = session
        self.group = group
        self.singles = singles
        self.shared = len(singles) > 1
        hold(session, self)
        # Of each thread, because each has a forward pass of its own under way.
        self._pending = threading.local()

    @property
    def to(self) -> str:
        """The session's selection string."""
        return str(self.session.selection)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGroup:
        # A handle of its own on the same session, which outlives a copy that is restored.
        memo[id(self)] = copied = LayerGroup(self.session, self.group, self.singles)
        return copied

    def __reduce__(self) -> NoReturn:
        raise OutsourcedWeightError(
            "an outsourced model cannot be pickled: its weights are at the workers. Save the adapter with "
            "save_pretrained, or a state_dict"
        )

    @uncompiled
    def output(self, member: int, x: Tensor, half: bool) -> Tensor:
        """See ``Evaluator.output``."""
        pending: _Pending | None = self._pending.__dict__.pop("last", None)
        if pending is not None and member in pending.outputs:
            if pending.belongs_to(x):
                output = pending.outputs.pop(member)
                if pending.outputs:
                    self._pending.last = pending
                return output
            self.shared = False
        # Tensors of inference mode keep no version, so a change in place would go unnoticed; those of a transform of
        # torch.func live no longer than it, and hide their values.
        if not self.shared or x.is_inference() or transformed(x):
            return self._evaluate(self.singles[member], x, half)[0]
        outputs = dict(enumerate(self._evaluate(self.group, x, half)))
        output = outputs.pop(member)
        modes = _differentiable(x), torch.is_inference_mode_enabled()
        self._pending.last = _Pending(weakref.ref(x), x._version, x.detach().clone(), *modes, outputs)
        return output

    def lookup(self, named: Tensor, owners: Owners | None) -> Tensor:
        """Rows of the table that this is a handle on, (tokens, K) float32.

        Args:
            named: (tokens, N) float32, a value for one row in each, times which the row's codes come.
            owners: as in ``Session.product``.
        """
        return self.session.product(self.group, "backward", named, owners).contiguous()

    def _refuse_beyond(self, x: Tensor, flat: Tensor, group: int) -> None:
        beyond = flat.isinf() & x.isfinite().reshape(flat.shape)
        if bool(beyond.any()):
            names = " + ".join(layer.name for layer in self.session.members(group))
            raise InputError(
                f"{names}: {int(beyond.sum())} of {x.numel()} values are infinite in float32, in which products are "
                "computed; nothing was sent"
            )

    def _evaluate(self, group: int, x: Tensor, half: bool) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        if x.dtype == torch.float64 and not transformed(x):
            self._refuse_beyond(x, flat, group)
        if len(flat) == 0:
            # Nothing to send: outputs without rows, through which empty gradients flow.
            members = self.session.members(group)
            outputs = tuple(flat[:, :1].expand(0, layer.out_features) for layer in members)
        else:
            owners = owners_of(x.shape)
            # Nobody will ask for a derivative: what autograd keeps for that costs as much as a small product.
            plain = not (_differentiable(flat) or transformed(flat) or in_forward_ad())
            product = OutsourcedProduct.forward if plain else OutsourcedProduct.apply
            outputs = product(flat, self.session, group, half, owners)
        return tuple(output.reshape(*x.shape[:-1], output.shape[-1]) for output in outputs)
