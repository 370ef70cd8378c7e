"""A tensor without elements in place of a weight that is at the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ciphertune.errors import OutsourcedWeightError

# Functions that read no values of a weight.
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


_ELSEWHERE = (
    "its session, with its keys and connections, belongs to one process. Outsource or load the model in each process "
    "that calls it; a data loader's processes need the data alone. To keep what was trained, save the adapter or a "
    "state_dict"
)
_EXPORTED = "a graph would compute without them. Restore the model, or merge the adapter into the original one, first"

_WHOLE = {
    "__reduce_ex__": f"pickled or sent to another process: {_ELSEWHERE}",
    "share_memory_": f"shared with another process: {_ELSEWHERE}",
    "_is_view": f"exported (torch.export, ONNX) or computed with fake tensors: {_EXPORTED}",
}
"""What is asked of a tensor → what somebody tries with the whole model, and what to do instead."""


def _size(full: torch.Size, dim: int | None = None) -> torch.Size | int:
    return full if dim is None else full[dim]


_SHAPE: dict[str, Callable[..., Any]] = {
    "shape": lambda full, *_: full,
    "size": _size,
    "dim": len,
    "ndim": lambda full, *_: len(full),
    "__len__": lambda full: full[0],
}


_SOME = "a layer"


class AbsentTensor(Tensor):
    """A weight that is at the workers. It has a shape, a device and a dtype; reading its values is an error.

    Libraries read the device, dtype and shape of ``layer.weight``. What needs its values (merging an adapter, DoRA, a
    model or a loss that computes with the weight itself) gets an error that names the layer. The shape is that of the
    values, since a loop over the rows of an empty tensor would silently do nothing.
    """

    layer: str
    full: torch.Size

    @staticmethod
    def make(layer: str, full: torch.Size, like: Tensor) -> AbsentTensor:
        """Make an absent weight of shape ``full`` with the device and dtype of ``like``."""
        absent = torch.empty(0, dtype=like.dtype, device=like.device).as_subclass(AbsentTensor)
        absent.layer, absent.full = layer, full
        return absent

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentTensor:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Allow functions that read metadata only; raise ``OutsourcedWeightError`` for others."""
        asked = _asked(func)
        if asked in _SHAPE and isinstance(args[0], AbsentTensor):
            return _SHAPE[asked](args[0].full, *args[1:], **(kwargs or {}))
        # Whoever wants a gradient of the weight would wait for it in vain.
        given = [*args[1:], *(kwargs or {}).values()]
        said = asked == "requires_grad_" or (asked == "requires_grad" and bool(given))
        if said and given and not all(given):
            return args[0] if asked == "requires_grad_" else None
        if said or not only_metadata(func):
            refuse(_named(args), asked)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and args and isinstance(args[0], AbsentTensor):
            result = result.as_subclass(AbsentTensor)
            result.layer, result.full = args[0].layer, args[0].full
        return result


def _named(values: Any) -> str:
    """The layer of the first absent weight among arguments."""
    for value in values:
        if isinstance(value, AbsentTensor):
            return value.layer
        if isinstance(value, (list, tuple)) and (found := _named(value)) != _SOME:
            return found
    return _SOME


def only_metadata(func: Any) -> bool:
    """Whether a function of torch, as ``__torch_function__`` gets it, asks of a tensor no more than metadata."""
    if getattr(func, "__name__", "") == "__get__":
        return _asked(func) in _METADATA_PROPERTIES or _asked(func) in _SHAPE
    return _asked(func) in _METADATA or _asked(func) in _SHAPE


def _asked(func: Any) -> str:
    """The name of a function, or of the property that it gets."""
    name = str(getattr(func, "__name__", ""))
    owner = str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return owner if name in ("__get__", "__set__") and owner else name


def refuse(layer: str, what: str) -> NoReturn:
    """Raise ``OutsourcedWeightError``: ``what`` cannot be computed with the weight of ``layer``."""
    if what in _WHOLE:
        raise OutsourcedWeightError(f"the weight of {layer!r} is at the workers, so the model cannot be {_WHOLE[what]}")
    raise OutsourcedWeightError(
        f"the weight of {layer!r} is at the workers, so {what!r} cannot be computed with it here. "
        "Merging adapters, and DoRA, need the original model: load the adapter there. Tuners and initialisations that "
        "read the weight as they are made (PiSSA, OLoRA, DeLoRA, …) can be added before the model is outsourced. If "
        "the model itself reads this weight, leave the layer out with layers=…"
    )


class WithoutWeight(nn.Module):
    """What modules have in common whose weight is at the workers; before the torch module that they stand for.

    Attributes:
        name: of the module, for errors.
        tied: whether the weight was tied to another module's. What ties it again has no effect: the values are at the
            workers.
    """

    name: str
    tied: bool

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another weight, but let ``tie_weights`` do as it always did."""
        if name != "weight":
            super().__setattr__(name, value)
        elif not self.tied:
            refuse(self.name, "assignment")

    def refuse_tracing(self, given: object) -> None:
        """Raise ``OutsourcedWeightError`` where a call is recorded, to be repeated without the workers.

        Args:
            given: what the module was called with.
        """
        if not isinstance(given, Tensor) and type(given).__module__.startswith("torch.fx"):
            raise OutsourcedWeightError(
                f"{self.name!r} is at the workers, so torch.fx cannot trace into it: make it a leaf of your Tracer "
                "(is_leaf_module)"
            )
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined]
            raise OutsourcedWeightError(f"{self.name!r} is at the workers, so torch.jit cannot trace it: {_EXPORTED}")

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``."""
        raise OutsourcedWeightError(f"{self.name!r} is at the workers, so torch.jit cannot compile it: {_EXPORTED}")

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise OutsourcedWeightError(
            f"{self.name!r} cannot be replicated by DataParallel: its session belongs to one process and device. "
            "Make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def reset_parameters(self) -> NoReturn:
        """Refuse: the weight is not here."""
        refuse(self.name, "reset_parameters")
