"""The module that replaces an outsourced linear layer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ciphertune._support.absent_tensor import ANCHOR, AbsentTensor, WithoutWeight
from ciphertune._support.torch_compat import autocast_dtype, without_autocast
from ciphertune.errors import InputError
from ciphertune.weights import LayerInfo


class Evaluator(Protocol):
    """Evaluates the products of layers that are outsourced together.

    Attributes:
        to: selection string that names the encryption and the workers, for people.
    """

    @property
    def to(self) -> str: ...  # noqa: D102 - see the class

    def output(self, member: int, x: Tensor, half: bool) -> Tensor:
        """``x Wᵀ`` of one layer, float32, differentiable in x.

        Args:
            member: position of the layer among those of this evaluator.
            x: the layer's input, (…, K), any floating dtype.
            half: whether the output becomes float16, whose gradients may overflow: these are NaN and no error.
        """
        ...


class OutsourcedLinear(WithoutWeight, nn.Linear):
    """A linear layer whose weight is at the workers; differentiable in its input.

    It is an ``nn.Linear`` so that peft and everything else that adapts linear layers by type treats it as one,
    but it holds no weight: ``weight`` is an empty buffer that says so when used.

    Args:
        info: what is known of the layer.
        bias: the original bias of shape (N,), which stays here, or None.
        group: evaluates the products of this layer and of those that read the same input.
        member: position of this layer in the group.
        like: a tensor whose device and dtype the layer reports as its weight's.
        tied: whether the weight was tied to another module's. What ties it again has no effect: the values are at the
            workers.

    Attributes:
        info: name, sizes, scale and norms of the layer.
        in_features, out_features: as in ``nn.Linear``.
        original: what stood here, for ``restore``; None if unknown.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    weight: Any
    original: Any = None

    def __init__(
        self,
        info: LayerInfo,
        bias: nn.Parameter | None,
        group: Evaluator,
        member: int,
        like: Tensor,
        *,
        tied: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.info = info
        self.name = info.name
        self.keep_parameters()
        self.in_features = info.in_features
        self.out_features = info.out_features
        self.group = group
        self.member = member
        full = torch.Size((info.out_features, info.in_features))
        self.register_buffer("weight", AbsentTensor.make(info.name, full, like), persistent=False)
        self.register_parameter("bias", bias)
        self.tied = tied

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 - the name nn.Linear uses
        """``input Wᵀ + bias``, input of shape (…, K); the result has its dtype, or autocast's where that is on.

        Raises:
            InputError: the last dimension is not K, or it is not floating point, or is nested or sparse.
            OutsourcedWeightError: the call is traced by ``torch.jit`` or ``torch.fx``, or is to compute with another
                weight.
        """
        x = input
        self.refuse_tracing(x)
        self.refuse_other_weight()
        self.refuse_layout(x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise InputError(f"{self.name}: expected an input of shape (…, {self.in_features}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise InputError(f"{self.name}: expected a floating-point input, got {x.dtype}")
        kind = x.device.type
        dtype = autocast_dtype(kind) or x.dtype
        half = torch.float16 in (dtype, x.dtype)
        with without_autocast(kind):
            y = self.group.output(self.member, x, half)
            if self.bias is not None:
                y = y + self.bias.to(torch.float32)
            return y.to(dtype)

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the weight at the workers, in the form that the layer before stored it in."""
        shell = getattr(self.original, "shell", None)
        stored_as_columns = shell is not None and not isinstance(shell, nn.Linear)  # transformers' Conv1D
        return weight.dim() == 2 and self.info.describes(weight.t() if stored_as_columns else weight)

    def anchor(self) -> None:
        """Hold a frozen parameter without elements, which is never saved.

        For a model with no other: libraries ask the first parameter for the device and the dtype.
        """
        like = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        self.register_parameter(ANCHOR, nn.Parameter(like, requires_grad=False))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ANCHOR, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        held = self._parameters.pop(ANCHOR, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if held is not None:
            self._parameters[ANCHOR] = held

    def extra_repr(self) -> str:
        """Sizes and where the weight is."""
        return f"in_features={self.in_features}, out_features={self.out_features}, to={self.group.to!r}"
