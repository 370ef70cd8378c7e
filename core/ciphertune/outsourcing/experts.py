"""The module that stands for a mixture's experts whose weights are at the workers.

Which experts a token goes to is data: it follows from what the token says. So every expert gets every token, and the
worker does the same work whatever routing chose. A product with all experts that begins at a token is one product, its
outputs one after the other, of which the client picks those that it needs. So is the one that leads back to tokens:
the sum over experts is the transposed product of such a stack, with zeros for the experts that a token does not use.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ciphertune._support.absent_tensor import AbsentTensor, refuse, refuse_another
from ciphertune._support.own_modes import own_modes
from ciphertune._support.torch_compat import autocast_dtype, uncompiled, without_autocast
from ciphertune.callers import Owners, has_several, owners_of
from ciphertune.client.session import Session
from ciphertune.errors import InputError, OutsourcedWeightError
from ciphertune.outsourcing.embedding import tokens_at_once
from ciphertune.outsourcing.holders import hold
from ciphertune.outsourcing.layers import Candidate
from ciphertune.outsourcing.replacing import move_hooks, shell_of, take_additions
from ciphertune.outsourcing.routed import FromInputs, FromOutputs, Stack
from ciphertune.outsourcing.stacked import Layout
from ciphertune.weights import LayerInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Products:
    """Products of one module of experts in a session.

    Attributes:
        session: the open session.
        inputs: group of the weights that tokens are multiplied with; one for each expert where routing is sent.
        outputs: the same of the weights that lead back.
    """

    session: Session
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        hold(self.session, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Products:
        return dataclasses.replace(self)

    def __reduce__(self) -> NoReturn:
        raise OutsourcedWeightError(
            "an outsourced model cannot be pickled: its weights are at the workers. Save the adapter with "
            "save_pretrained, or a state_dict"
        )


class OutsourcedExperts(nn.Module):
    """Experts of a mixture, their weights at the workers; differentiable in tokens and in routing weights.

    Biases, activations and norms stay here. Whatever else the class of the original has is there as well.

    Args:
        original: a module like the original, without its weights.
        name: of the module.
        layout: of the weights.
        infos: of the layers, by parameter and then by expert.
        products: where they are evaluated.
        like: a tensor whose device and dtype the weights report.

    Attributes:
        name, layout, infos, products: as given.
        original: what ``restore`` needs.
    """

    original: Any = None

    def __init__(
        self,
        original: nn.Module,
        name: str,
        layout: Layout,
        infos: Sequence[LayerInfo],
        products: Products,
        like: Tensor,
    ) -> None:
        super().__init__()
        for attribute, value in vars(original).items():
            vars(self).setdefault(attribute, value)
        for kept in ("_parameters", "_buffers", "_modules"):
            vars(self)[kept] = dict(vars(original)[kept])
        self.name, self.layout, self.infos, self.products = name, layout, tuple(infos), products
        vars(self)["_class"] = type(original)
        holders = {path.rpartition(".")[0] for path in layout.parameters} - {""}
        self._modules |= {holder: shell_of(original.get_submodule(holder)) for holder in holders}
        for path in layout.parameters:
            holder, _, last = path.rpartition(".")
            owner = self.get_submodule(holder)
            owner._parameters.pop(last, None)
            absent = AbsentTensor.make(f"{name}.{path}", _shape(layout, path), like)
            owner.register_buffer(last, absent, persistent=False)

    def __getattr__(self, attribute: str) -> Any:
        """What the original's class has, such as ways to apply a gate."""
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            found = getattr(vars(self).get("_class"), attribute, None)
            if found is None:
                raise
            return found.__get__(self) if callable(found) else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse other weights."""
        if "layout" in vars(self) and name in self.layout.parameters:
            refuse(self.name, "assignment")
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: Any, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Take a state dict that has the weights, where they are those at the workers.

        Raises:
            OutsourcedWeightError: one is another.
        """
        count = self.layout.experts
        taken = set()
        for number, path in enumerate(self.layout.parameters):
            given = state_dict.get(f"{prefix}{path}")
            if not isinstance(given, Tensor) or isinstance(given, AbsentTensor):
                continue
            infos = self.infos[number * count : (number + 1) * count]
            if given.shape != _shape(self.layout, path) or not all(
                info.describes(self.layout.matrix(path, given, expert)) for expert, info in enumerate(infos)
            ):
                refuse_another(f"{self.name}.{path}")
            taken.add(f"{prefix}{path}")
        rest = {name: value for name, value in state_dict.items() if name not in taken}
        super()._load_from_state_dict(rest, prefix, local, strict, missing, unexpected, errors)

    def _refuse_other_weights(self) -> None:
        """Raise ``OutsourcedWeightError`` where another weight was put here, as by ``functional_call``."""
        for path in self.layout.parameters:
            holder, _, last = path.rpartition(".")
            owner = self.get_submodule(holder)
            if last in owner._parameters or not isinstance(owner._buffers.get(last), AbsentTensor):
                refuse_another(f"{self.name}.{path}")

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise OutsourcedWeightError(
            f"{self.name!r} cannot be replicated by DataParallel: its session belongs to one process and device. "
            "Make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )

    @uncompiled
    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of what each token's experts give; what each gives where they have inputs of their own.

        Args:
            hidden_states: (…, H), any floating dtype.
            top_k_index: (tokens, k), numbers of experts; E and above stand for none.
            top_k_weights: (tokens, k), what each is weighted with.

        Returns:
            As ``hidden_states``, of its dtype.

        Raises:
            InputError: a shape or a dtype is wrong.
        """
        x = hidden_states
        self._refuse_other_weights()
        if x.dim() == 0 or x.shape[-1] != self.layout.hidden or not x.is_floating_point():
            raise InputError(
                f"{self.name}: expected a floating-point input of shape (…, {self.layout.hidden}), got {x.dtype} of "
                f"shape {tuple(x.shape)}"
            )
        flat = x.reshape(-1, self.layout.hidden)
        if self.layout.apart:
            return self._apart(x)
        if top_k_index is None or top_k_weights is None:
            raise InputError(f"{self.name}: a mixture needs routing: numbers of experts, and weights")
        chosen = top_k_index.reshape(-1, top_k_index.shape[-1]).long()
        if chosen.shape != top_k_weights.reshape(chosen.shape).shape or len(chosen) != len(flat):
            raise InputError(f"{self.name}: {len(flat)} tokens, but routing of {len(chosen)}")
        dtype = autocast_dtype(x.device.type) or x.dtype
        half = torch.float16 in (dtype, x.dtype)
        if len(flat) == 0:
            return torch.zeros_like(x)
        owners = _owners(x)
        present = (chosen >= 0) & (chosen < self.layout.experts)
        weights = top_k_weights.reshape(chosen.shape).to(torch.float32).masked_fill(~present, 0.0)
        chosen = chosen.clamp(0, self.layout.experts - 1)
        with without_autocast(x.device.type):
            if len(self.products.inputs) > 1:
                y = self._routed(flat, chosen, weights, present, dtype, half)
            else:
                # Each caller's tokens have secrets of their own, so they stay together.
                most = len(flat) if owners is not None else tokens_at_once(self.layout.widest)
                parts = [slice(start, start + most) for start in range(0, len(flat), most)]
                together = [self._all(flat[p], chosen[p], weights[p], dtype, half, owners) for p in parts]
                y = together[0] if len(together) == 1 else torch.cat(together)
            return y.to(x.dtype).reshape(x.shape)

    def _stack(self, side: str, expert: int | None, half: bool) -> Stack:
        groups = self.products.inputs if side == "inputs" else self.products.outputs
        count = len(self.layout.inputs) if side == "inputs" else 1
        width = self.layout.wide if side == "inputs" else self.layout.width
        experts = self.layout.experts if expert is None else 1
        return Stack(self.products.session, groups[expert or 0], count, experts, width, half)

    def _all(
        self, x: Tensor, chosen: Tensor, weights: Tensor, dtype: torch.dtype, half: bool, owners: Owners | None
    ) -> Tensor:
        """Every token to every expert."""
        first, last = (self._stack(side, None, half) for side in ("inputs", "outputs"))
        products = FromInputs.apply(x.to(torch.float32), chosen, first, True, owners)  # type: ignore[no-untyped-call]
        hidden = self._between(products, chosen, dtype)
        if self.layout.norm is None:
            y = FromOutputs.apply(hidden * weights[..., None], chosen, last, True, owners)  # type: ignore[no-untyped-call]
            return self._plus_bias(y, chosen, weights)
        # What is not linear comes after: each of a token's experts is a row of its own.
        repeated = None if owners is None else tuple((caller, count * chosen.shape[1]) for caller, count in owners)
        rows = hidden.flatten(0, 1)[:, None]
        single = FromOutputs.apply(rows, chosen.reshape(-1, 1), last, True, repeated)  # type: ignore[no-untyped-call]
        return self._summed(single.view(*chosen.shape, -1), chosen, weights, dtype)

    def _apart(self, x: Tensor) -> Tensor:
        """To each expert its own input, of as many tokens for all."""
        dtype = autocast_dtype(x.device.type) or x.dtype
        half = torch.float16 in (dtype, x.dtype)
        inputs = x.reshape(self.layout.experts, -1, self.layout.hidden)
        if inputs.shape[1] == 0:
            return torch.zeros_like(x)
        alone = torch.zeros(inputs.shape[1], 1, dtype=torch.int64, device=x.device)
        outputs = []
        with without_autocast(x.device.type):
            for expert, own in enumerate(inputs):
                owners = owners_of(own.shape)
                first, last = (self._stack(side, expert, half) for side in ("inputs", "outputs"))
                products = FromInputs.apply(own.to(torch.float32), alone, first, True, owners)  # type: ignore[no-untyped-call]
                hidden = self._between(products, alone, dtype)
                outputs.append(FromOutputs.apply(hidden, alone, last, True, owners))  # type: ignore[no-untyped-call]
            return torch.stack(outputs).to(x.dtype).reshape(x.shape)

    def _routed(
        self, x: Tensor, chosen: Tensor, weights: Tensor, present: Tensor, dtype: torch.dtype, half: bool
    ) -> Tensor:
        """To each expert the tokens that routing chose, and nothing to one that none goes to."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.layout.experts):
            tokens, places = torch.where((chosen == expert) & present)
            if len(tokens) == 0:
                continue
            own = chosen[tokens, places][:, None]
            alone = torch.zeros_like(own)
            first, last = (self._stack(side, expert, half) for side in ("inputs", "outputs"))
            products = FromInputs.apply(x[tokens].to(torch.float32), alone, first, True)  # type: ignore[no-untyped-call]
            hidden = self._between(products, own, dtype)
            single = FromOutputs.apply(hidden, alone, last, True)  # type: ignore[no-untyped-call]
            part = self._summed(single[:, None], own, weights[tokens, places][:, None], dtype)
            y = y.index_add(0, tokens, part)
        return y

    def _between(self, products: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """What the experts' output weights are multiplied with, (tokens, k, I), of (tokens, k, P · N)."""
        if self.layout.input_bias is not None:
            products = products + self.get_parameter(self.layout.input_bias)[chosen].to(torch.float32)
        rows = products.flatten(0, 1).to(dtype)
        hidden: Tensor = self.layout.gate(self, rows)
        return hidden.to(torch.float32).view(*chosen.shape, -1)

    def _plus_bias(self, y: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.layout.output_bias is None:
            return y
        bias = self.get_parameter(self.layout.output_bias)[chosen].to(torch.float32)
        return y + (bias * weights[..., None]).sum(1)

    def _summed(self, single: Tensor, chosen: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The weighted sum of what each expert gives, (tokens, k, H)."""
        if self.layout.norm is None:
            return self._plus_bias((single * weights[..., None]).sum(1), chosen, weights)
        if self.layout.output_bias is not None:
            single = single + self.get_parameter(self.layout.output_bias)[chosen].to(torch.float32)
        normed = self.get_submodule(self.layout.norm)(single.to(dtype))
        weighted: Tensor = normed.to(torch.float32) * weights[..., None]
        return weighted.sum(1)

    def extra_repr(self) -> str:
        """Sizes and where the weights are."""
        to = self.products.session.selection
        return f"experts={self.layout.experts}, in_features={self.layout.hidden}, to={str(to)!r}"


def outsourced_experts(model: nn.Module) -> list[OutsourcedExperts]:
    """The outsourced experts of a model."""
    return [module for module in model.modules() if isinstance(module, OutsourcedExperts)]


@dataclasses.dataclass(eq=False)
class OriginalExperts:
    """What stood in the place of outsourced experts.

    Attributes:
        shell: a module of its class with all that it had but the weights.
        requires_grad: of each weight, as it was.
        own: attributes of the outsourced experts themselves, as of ``replacing.Original``.
    """

    shell: nn.Module
    requires_grad: dict[str, bool]
    own: frozenset[str] = frozenset()


@own_modes()
def replace_experts(
    parts: Sequence[Candidate], infos: Sequence[LayerInfo], products: Products, device: torch.device
) -> None:
    """Put outsourced experts in the place of a module with stacked weights.

    Args:
        parts: all of the module, by parameter and then by expert.
        infos: of each.
        products: where they are evaluated.
        device: where the weights are said to be.
    """
    first = parts[0]
    assert first.part is not None
    assert first.part.layout is not None
    layout = first.part.layout
    old = first.module
    like = torch.empty(0, dtype=first.parameter().dtype, device=device)
    original = OriginalExperts(
        shell_of(old, *(path for path in layout.parameters if "." not in path)),
        {path: old.get_parameter(path).requires_grad for path in layout.parameters},
    )
    new = OutsourcedExperts(old, first.place, layout, infos, products, like)
    new.original = original
    original.own = frozenset(vars(new)) - (frozenset(vars(old)) - frozenset(vars(nn.Module())))
    move_hooks(old, new)
    setattr(first.parent, first.attribute, new.train(old.training))
    if _note_input not in first.parent._forward_pre_hooks.values():
        first.parent.register_forward_pre_hook(_note_input)


@own_modes()
def restore_experts(
    parent: nn.Module, attribute: str, experts: OutsourcedExperts, weights: Sequence[Tensor], frozen: bool
) -> None:
    """Put the original module back, with these weights.

    Args:
        parent: what the outsourced experts hang in.
        attribute: their name there.
        experts: these.
        weights: of each layer, float32, in the order of ``infos``.
        frozen: whether the model was frozen since.
    """
    original: OriginalExperts = experts.original
    layout = experts.layout
    module = original.shell
    for kept in ("_parameters", "_buffers", "_modules"):
        held = {name: value for name, value in vars(experts)[kept].items() if not isinstance(value, AbsentTensor)}
        # In the order of the original, weights among them.
        vars(module)[kept] = dict.fromkeys(vars(module)[kept]) | held
    count = layout.experts
    for number, path in enumerate(layout.parameters):
        holder, _, last = path.rpartition(".")
        owner = module.get_submodule(holder)
        like: Any = getattr(owner if holder else experts, last)
        value = layout.stacked(path, list(weights[number * count : (number + 1) * count]))
        owner._buffers.pop(last, None)
        trained = original.requires_grad[path] and not frozen
        owner._parameters[last] = nn.Parameter(value.to(like.device, like.dtype), requires_grad=trained)
    take_additions(experts, module, original.own)
    move_hooks(experts, module)
    for key, hook in list(parent._forward_pre_hooks.items()):
        if hook is _note_input:
            del parent._forward_pre_hooks[key]
    setattr(parent, attribute, module.train(experts.training))


def _shape(layout: Layout, path: str) -> torch.Size:
    matrix = torch.empty(layout.width if path == layout.output else layout.wide, layout.hidden, device="meta")
    return layout.stacked(path, [matrix] * layout.experts).shape


_noted = threading.local()


def _note_input(module: nn.Module, args: Any) -> None:
    """Before what holds experts is called: keep its input in sight, which has a dimension for a batch's rows."""
    if has_several() and args and isinstance(args[0], Tensor) and args[0].dim() > 2:
        _noted.input = weakref.ref(args[0])


def _owners(x: Tensor) -> Owners | None:
    """Whose the tokens are. Experts get tokens in one row; they are those of the input of what holds the experts."""
    held = getattr(_noted, "input", None)
    source = held() if held is not None else None
    if x.dim() == 2 and source is not None and has_several():
        flat = source.detach().reshape(-1, source.shape[-1])
        if flat.shape == x.shape and torch.equal(flat, x.detach()):
            return owners_of(source.shape)
    return owners_of(x.shape)
