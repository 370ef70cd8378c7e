"""Convolutions whose weight is at the workers: which they are, and the module that sends patches there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.absent_tensor import AbsentTensor, WithoutWeight
from ciphertune._support.torch_compat import autocast_dtype, without_autocast
from ciphertune.errors import InputError, NothingOutsourcedError
from ciphertune.linear import Evaluator
from ciphertune.outsourcing.layers import Candidate, LayerChoice, matching, meant_to_train
from ciphertune.outsourcing.obstacles import something_of_its_own, weight_obstacle
from ciphertune.outsourcing.walk import bare_name, walk
from ciphertune.weights import LayerInfo

_LEAST = 32.0
"""Multiplications that a convolution saves for each value that is sent or comes back, at least, to be worth it: those
of a linear layer of 64 to 64 features."""


def choose_convolutions(
    model: nn.Module, choice: bool | LayerChoice | Iterable[LayerChoice], *, allow_meta: bool = False
) -> list[Candidate]:
    """Choose convolutions, as ``choose_layers`` does with linear layers.

    Args:
        model: any module.
        allow_meta: take convolutions without weights, on the meta device, as well.
        choice: False for none; True for all that can be outsourced and save at least 32 multiplications for each value
            that is sent or comes back; or names, patterns, types and predicates.

    Raises:
        UnknownLayerError: a name or pattern matches nothing.
        UnsupportedLayerError: a convolution that is named exactly cannot be outsourced.
        NothingOutsourcedError: none is left.
    """
    if choice is False:
        return []
    found = convolutions(model, allow_meta=allow_meta)
    if choice is True:
        chosen = [each for each in found if each.obstacle is None and saved_by_value(each.module) >= _LEAST]
    else:
        single = isinstance(choice, (str, type)) or callable(choice)
        choices: list[Any] = [choice] if single else list(choice)  # type: ignore[arg-type]
        chosen = matching(found, choices, "convolution")
    if not chosen:
        reasons = "; ".join(
            f"{each.name}: {each.obstacle or 'its patches cost more than it saves'}" for each in found[:5]
        )
        raise NothingOutsourcedError(f"no convolution is left to outsource: {reasons or 'the model has none'}")
    return chosen


def saved_by_value(module: nn.Module) -> float:
    """Multiplications that the client saves for each value that it sends or gets: of a patch, and of its outputs."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.shape[0], weight[0].numel()
    return outputs * inputs / (outputs + inputs)


def convolutions(model: nn.Module, *, allow_meta: bool = False) -> list[Candidate]:
    """List every convolution of a model that is not an adapter's own, in module order."""
    mixed = meant_to_train(model)
    return [
        Candidate(bare_name(model, path), parent, attribute, module, _obstacle(module, mixed, allow_meta), None)
        for path, parent, attribute, module in walk(model)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not isinstance(module, OutsourcedConv)
    ]


def _obstacle(module: nn.Conv1d | nn.Conv2d, mixed: bool, allow_meta: bool) -> str | None:
    """Why a convolution cannot be outsourced, None if it can."""
    found = something_of_its_own(module)
    if found is not None:
        return found
    weight = module.weight
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return f"{type(module).__name__} is a convolution with a behaviour of its own"
    if module.groups != 1:
        return f"its channels are in {module.groups} groups, and a product is of one"
    return weight_obstacle(weight, mixed, allow_meta)


class OutsourcedConv(WithoutWeight, nn.Module):
    """A convolution whose weight is at the workers; differentiable in its input.

    Its patches, the values below the kernel at each place, are the rows of a linear product. So every input value is
    sent about as often as kernel elements cover it, in both directions.

    Args:
        info: what is known of the weight, (out_channels, in_channels · kernel elements).
        old: the convolution that stood here; its bias stays.
        group: evaluates the product.
        like: a tensor whose device and dtype the layer reports as its weight's.
        tied: whether the weight was tied to another module's.

    Attributes:
        info: name, sizes, scale and norms of the product.
        original: what stood here, for ``restore``.
    """

    weight: Any
    bias: Any
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    original: Any = None

    def __init__(
        self, info: LayerInfo, old: nn.Conv1d | nn.Conv2d, group: Evaluator, like: Tensor, *, tied: bool
    ) -> None:
        nn.Module.__init__(self)
        self.info, self.name, self.group, self.tied = info, info.name, group, tied
        self.keep_parameters()
        for attribute in _SETTINGS:
            setattr(self, attribute, getattr(old, attribute))
        full = old.weight.shape
        self.register_buffer("weight", AbsentTensor.make(info.name, full, like), persistent=False)
        self.register_parameter("bias", old._parameters.get("bias"))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d uses
        """As ``nn.Conv1d`` and ``nn.Conv2d``; the result has the input's dtype, or autocast's where that is on.

        Raises:
            InputError: the input's shape, dtype or layout does not fit.
            OutsourcedWeightError: the call is traced by ``torch.jit`` or ``torch.fx``, or is to compute with another
                weight.
        """
        x = input
        self.refuse_tracing(x)
        self.refuse_other_weight()
        self.refuse_layout(x)
        places = len(self.kernel_size)
        if x.dim() not in (places + 1, places + 2) or x.shape[-places - 1] != self.in_channels:
            raise InputError(
                f"{self.name}: expected an input of shape (batch, {self.in_channels}, …) with {places} dimensions "
                f"behind it, got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise InputError(f"{self.name}: expected a floating-point input, got {x.dtype}")
        kind = x.device.type
        dtype = autocast_dtype(kind) or x.dtype
        half = torch.float16 in (dtype, x.dtype)
        with without_autocast(kind):
            batched = x if x.dim() == places + 2 else x.unsqueeze(0)
            patches, sizes = self._patches(batched.to(torch.float32))
            y = self.group.output(0, patches, half)
            if self.bias is not None:
                y = y + self.bias.to(torch.float32)
            y = y.transpose(1, 2).reshape(len(batched), self.out_channels, *sizes)
            result: Tensor = y.to(dtype)
        return result if x.dim() == places + 2 else result.squeeze(0)

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the weight at the workers, in the form that ``nn.Conv2d`` stores it in."""
        return weight.shape == self.weight.shape and self.info.describes(weight.flatten(1))

    def _patches(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Patches of (batch, C, …), (batch, places, C · kernel elements), and the sizes that the places make up."""
        mode: Any = "constant" if self.padding_mode == "zeros" else self.padding_mode
        kernel, stride, dilation = (getattr(self, name) for name in ("kernel_size", "stride", "dilation"))
        padding: Any = self._reversed_padding_repeated_twice
        if any(padding):
            x = nn.functional.pad(x, tuple(padding), mode=mode)
        sizes = [
            (size - step * (width - 1) - 1) // jump + 1
            for size, width, jump, step in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        ]
        if min(sizes) < 1:
            raise InputError(f"{self.name}: an input of shape {tuple(x.shape)} is smaller than the kernel {kernel}")
        if len(kernel) == 1:
            x = x.unsqueeze(2)
            kernel, stride, dilation = ((1, *each) for each in (kernel, stride, dilation))
        return nn.functional.unfold(x, kernel, dilation, 0, stride).transpose(1, 2), sizes

    def extra_repr(self) -> str:
        """Sizes and where the weight is."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"to={self.group.to!r}"
        )


_SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class OutsourcedConv1d(OutsourcedConv, nn.Conv1d):
    """An ``OutsourcedConv`` that adapters take for the ``nn.Conv1d`` that it stands for."""

    def __new__(cls, first: Any, *args: Any, **kwargs: Any) -> Any:
        """An ``nn.Conv1d`` for the arguments of one: peft makes its own layers of the class that it adapts."""
        return nn.Conv1d(first, *args, **kwargs) if isinstance(first, int) else super().__new__(cls)


class OutsourcedConv2d(OutsourcedConv, nn.Conv2d):
    """An ``OutsourcedConv`` that adapters take for the ``nn.Conv2d`` that it stands for."""

    def __new__(cls, first: Any, *args: Any, **kwargs: Any) -> Any:
        """An ``nn.Conv2d`` for the arguments of one: peft makes its own layers of the class that it adapts."""
        return nn.Conv2d(first, *args, **kwargs) if isinstance(first, int) else super().__new__(cls)


def outsourced_convolutions(model: nn.Module) -> list[OutsourcedConv]:
    """The outsourced convolutions of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, OutsourcedConv)]


def sent_per_value(module: nn.Conv1d | nn.Conv2d | OutsourcedConv) -> float:
    """How often a convolution sends each value of a large input: kernel elements over those that the stride skips."""
    return math.prod(module.kernel_size) / math.prod(module.stride)
