"""The module that stands where a linear layer stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ciphertune.compat import autocast_dtype
from ciphertune.errors import InputError, OutsourcedWeightError
from ciphertune.group import LayerGroup
from ciphertune.weights import LayerInfo

# What a module tree may ask of a weight without wanting its values.
_METADATA = frozenset(
    {
        "__get__",
        "numel",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "storage_offset",
        "stride",
        "data_ptr",
        "untyped_storage",
        "to",
        "cpu",
        "cuda",
        "float",
        "half",
        "bfloat16",
        "double",
        "requires_grad_",
        "detach",
        "contiguous",
        "is_pinned",
        "__repr__",
        "__hash__",
        "__deepcopy__",
        "get_device",
        "type",
        "is_shared",
        "has_names",
    }
)
_METADATA_PROPERTIES = frozenset(
    {
        "device",
        "dtype",
        "requires_grad",
        "is_meta",
        "is_cuda",
        "is_quantized",
        "is_sparse",
        "layout",
        "grad",
        "grad_fn",
        "is_leaf",
        "nbytes",
        "itemsize",
        "names",
        "is_nested",
        "is_mkldnn",
        "is_xla",
        "is_cpu",
        "is_mps",
        "is_xpu",
        "_version",
        "_backward_hooks",
    }
)


def _size(full: torch.Size, dim: int | None = None) -> torch.Size | int:
    return full if dim is None else full[dim]


_SHAPE: dict[str, Callable[..., Any]] = {
    "shape": lambda full, *_: full,
    "size": _size,
    "dim": len,
    "ndim": lambda full, *_: len(full),
    "__len__": lambda full: full[0],
}


class AbsentWeight(Tensor):
    """A weight that is at the workers: a shape, a device and a dtype, no elements, and an error for anything else.

    Libraries look at ``layer.weight`` for its device, dtype and shape; whoever wants its values (merging an adapter,
    DoRA, a model or a loss that computes with the weight itself) is told which layer it is. The shape is the one that
    the values would have: a loop over the rows of an empty tensor would do nothing, and say nothing.
    """

    layer: str
    full: torch.Size

    @staticmethod
    def make(layer: str, full: torch.Size, like: Tensor) -> AbsentWeight:
        """An absent weight of shape ``full`` with the device and dtype of ``like``."""
        absent = torch.empty(0, dtype=like.dtype, device=like.device).as_subclass(AbsentWeight)
        absent.layer, absent.full = layer, full
        return absent

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentWeight:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let questions about metadata through, refuse the rest."""
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        asked = owner if name == "__get__" else name
        if asked in _SHAPE and isinstance(args[0], AbsentWeight):
            return _SHAPE[asked](args[0].full, *args[1:], **(kwargs or {}))
        allowed = owner in _METADATA_PROPERTIES if name == "__get__" else name in _METADATA
        if not allowed:
            _refuse(next((a.layer for a in args if isinstance(a, AbsentWeight)), "a layer"), owner or name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and args and isinstance(args[0], AbsentWeight):
            result = result.as_subclass(AbsentWeight)
            result.layer, result.full = args[0].layer, args[0].full
        return result


def _refuse(layer: str, what: str) -> NoReturn:
    raise OutsourcedWeightError(
        f"the weight of {layer!r} is at the workers, so {what!r} cannot be computed with it here. "
        "Merging adapters, DoRA and initialisations drawn from the weight (PiSSA, OLoRA, …) need the original model: "
        "load the adapter there. If the model itself reads this weight, leave the layer out with layers=…"
    )


class OutsourcedLinear(nn.Linear):
    """A linear layer whose weight is at the workers; differentiable in its input.

    It is an ``nn.Linear`` so that peft and everything else that adapts linear layers by type treats it as one,
    but it holds no weight: ``weight`` is an empty buffer that says so when used.

    Args:
        info: what is known of the layer.
        bias: the original bias of shape (N,), which stays here, or None.
        group: the handle on the session's unit that this layer belongs to.
        member: position of this layer in the group.
        like: a tensor whose device and dtype the layer reports as its weight's.

    Attributes:
        info: name, sizes, scale and norms of the layer.
        in_features, out_features: as in ``nn.Linear``.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    weight: Any

    def __init__(
        self,
        info: LayerInfo,
        bias: nn.Parameter | None,
        group: LayerGroup,
        member: int,
        like: Tensor,
    ) -> None:
        nn.Module.__init__(self)
        self.info = info
        self.name = info.name
        self.in_features = info.in_features
        self.out_features = info.out_features
        self.group = group
        self.member = member
        full = torch.Size((info.out_features, info.in_features))
        self.register_buffer("weight", AbsentWeight.make(info.name, full, like), persistent=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 - the name nn.Linear uses
        """``input Wᵀ + bias``, input of shape (…, K); the result has its dtype, or autocast's where that is on.

        Raises:
            InputError: the last dimension is not K, it is not floating point, is empty, or is not finite.
        """
        x = input
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise InputError(f"{self.name}: expected an input of shape (…, {self.in_features}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise InputError(f"{self.name}: expected a floating-point input, got {x.dtype}")
        kind = x.device.type
        dtype = autocast_dtype(kind) or x.dtype
        with torch.autocast(kind, enabled=False):
            y = self.group.output(self.member, x)
            if self.bias is not None:
                y = y + self.bias.to(torch.float32)
            return y.to(dtype)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise OutsourcedWeightError(
            f"{self.name!r} cannot be replicated by DataParallel: its session belongs to one process and device. "
            "Make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def reset_parameters(self) -> NoReturn:
        """Refuse: the weight is not here."""
        _refuse(self.name, "reset_parameters")

    def extra_repr(self) -> str:
        """Sizes and where the weight is."""
        to = self.group.session.choice.selection
        return f"in_features={self.in_features}, out_features={self.out_features}, to={str(to)!r}"
