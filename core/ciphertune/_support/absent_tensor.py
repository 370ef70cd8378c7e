"""A tensor without elements in place of a weight that is at the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ciphertune.errors import InputError, OutsourcedWeightError

ANCHOR = "anchor_of_device"
"""Name of a parameter without elements, see ``OutsourcedLinear.anchor``."""

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

_AVERAGED = frozenset({"copy_", "lerp_", "_foreach_lerp_", "_foreach_copy_"})
"""What copies of a model are kept up to date with, as ``torch.optim.swa_utils`` does it."""


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
        if asked in _AVERAGED and (others := _without_same(*args)) is not None:
            # A layer's copies are at the workers as one: their average is what it was.
            return args[0] if not others else func(*others, **(kwargs or {}))
        # Its own on another device, as what shards a model puts it there.
        moved = asked == "data" and len(given) == 1 and _without_same(args[0], given[0]) == ()
        if said or not (moved or only_metadata(func)):
            refuse(_named(args), asked)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and args and isinstance(args[0], AbsentTensor):
            result = result.as_subclass(AbsentTensor)
            result.layer, result.full = args[0].layer, args[0].full
        return result


def _without_same(target: Any, source: Any = None, *rest: Any) -> tuple[Any, ...] | None:
    """Arguments without the absent weights in both of the first two; None where one is in only one of them.

    Nothing is left, the empty tuple, where there was nothing else.
    """
    single = isinstance(target, Tensor)
    pairs = [(target, source)] if single else list(zip(target, source or (), strict=False))
    kept = []
    for one, other in pairs:
        absent = [each for each in (one, other) if isinstance(each, AbsentTensor)]
        if len({each.layer for each in absent}) > 1 or len(absent) == 1:
            return None
        if not absent:
            kept.append((one, other))
    if single or not kept:
        return ()
    return [one for one, _ in kept], [other for _, other in kept], *rest


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
        "read the weight as they are made (PiSSA, OLoRA, CorDA, LoftQ, DeLoRA, …) can be added before the model is "
        "outsourced. If the model itself reads this weight, leave the layer out with layers=…"
    )


def refuse_another(layer: str) -> NoReturn:
    """Raise ``OutsourcedWeightError``: ``layer`` was given another weight than the one at the workers."""
    raise OutsourcedWeightError(
        f"{layer!r} was given another weight (functional_call, load_state_dict, a parametrization or an assignment), "
        "but computes with the one at the workers: change the weight before the model is outsourced, restore the model "
        "first, or leave the layer out with layers=…"
    )


class _Parameters(dict[str, Any]):
    """A module's parameters, of which the weight that is not there is not taken away silently or with a ``KeyError``.

    The old ``weight_norm`` and ``spectral_norm``, and pruning, begin with that.
    """

    layer = _SOME

    def __missing__(self, name: str) -> NoReturn:
        if name == "weight":
            refuse(self.layer, "a norm or a mask of it")
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name == "weight" and name not in self:
            refuse(self.layer, "a norm or a mask of it")
        super().__delitem__(name)


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

    def refuse_other_weight(self) -> None:
        """Raise ``OutsourcedWeightError`` where another weight was put here past ``__setattr__``.

        ``functional_call``, an unsafe parametrization and writes to ``_parameters`` do that. Products are computed with
        the weight at the workers all the same.
        """
        if torch.compiler.is_compiling():
            return
        if "weight" in self._parameters or not isinstance(self._buffers.get("weight"), AbsentTensor):
            refuse_another(self.name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of ``nn.Module``; what keeps the weight under another name (pruning) is refused."""
        if isinstance(param, AbsentTensor):
            refuse(self.name, "a norm or a mask of it")
        if name == "weight":
            refuse(self.name, "assignment")
        super().register_parameter(name, param)

    def keep_parameters(self) -> None:
        """Have parameters in which no weight can be looked for in vain; once, as the module is made."""
        vars(self)["_parameters"] = parameters = _Parameters()
        parameters.layer = self.name

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: Any, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Take a state dict that has the weight, where it is the one at the workers.

        Raises:
            OutsourcedWeightError: it is another.
        """
        key = f"{prefix}weight"
        if isinstance(given := state_dict.get(key), Tensor) and not isinstance(given, AbsentTensor):
            if not self.holds(given):
                refuse_another(self.name)
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(state_dict, prefix, local, strict, missing, unexpected, errors)

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the weight at the workers, in the form that the module stores it in."""
        raise NotImplementedError

    def refuse_layout(self, x: Tensor) -> None:
        """Raise ``InputError`` for an input whose rows are not in one block of memory."""
        if x.is_nested:
            raise InputError(
                f"{self.name}: nested tensors are not taken: call the layer with their values, or pad them"
            )
        if x.layout != torch.strided:
            raise InputError(f"{self.name}: the input has the layout {x.layout}: make it dense first (to_dense)")

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
