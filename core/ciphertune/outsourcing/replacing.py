"""An outsourced layer in the place of a linear one, and that linear layer again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.absent_tensor import ANCHOR, AbsentTensor
from ciphertune._support.own_modes import own_modes
from ciphertune.errors import UnsupportedLayerError
from ciphertune.linear import OutsourcedLinear
from ciphertune.outsourcing.convolution import OutsourcedConv, OutsourcedConv1d, OutsourcedConv2d
from ciphertune.outsourcing.embedding import OutsourcedEmbedding
from ciphertune.outsourcing.group import LayerGroup
from ciphertune.outsourcing.layers import Candidate
from ciphertune.outsourcing.obstacles import is_conv1d
from ciphertune.outsourcing.walk import bare_name, walk
from ciphertune.weights import LayerInfo

Outsourced = OutsourcedLinear | OutsourcedEmbedding | OutsourcedConv
"""What stands in the place of a module whose weight went to the workers."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclasses.dataclass(eq=False)
class Weight:
    """A parameter that went to the workers.

    Attributes:
        requires_grad: as it was.
        tied_to: names of parameters of the model that stay and were the very same tensor.
        shared: whether it hung in more than one place of the model.
    """

    requires_grad: bool
    tied_to: tuple[str, ...]
    shared: bool


@dataclasses.dataclass(eq=False)
class Original:
    """What stood in the place of an outsourced layer.

    Attributes:
        shell: a module of its class with all that it had but the weight.
        weight: layers that shared a weight share this.
        own: attributes of the outsourced layer itself, which do not go over to the layer that is restored.
    """

    shell: nn.Module
    weight: Weight
    own: frozenset[str] = frozenset()


def originals(model: nn.Module, chosen: Sequence[Candidate]) -> list[Original]:
    """What ``take_back`` will need of each chosen layer. The model is not changed."""
    goes = {id(candidate.module) for candidate in chosen if candidate.part is None}
    places: dict[int, list[str]] = {}
    counts: dict[int, int] = {}
    for path, module in _modules(model):
        for attribute, parameter in module._parameters.items():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
            if id(module) not in goes:
                places.setdefault(id(parameter), []).append(f"{path}.{attribute}" if path else attribute)
    weights: dict[int, Weight] = {}
    shells: dict[int, Original] = {}
    for candidate in chosen:
        parameter = candidate.module._parameters["weight"]
        assert parameter is not None
        key = id(parameter)
        if key not in weights:
            weights[key] = Weight(parameter.requires_grad, tuple(places.get(key, ())), counts.get(key, 0) > 1)
        if id(candidate.module) not in shells:
            shells[id(candidate.module)] = Original(shell_of(candidate.module, "weight"), weights[key])
    return [shells[id(candidate.module)] for candidate in chosen]


@own_modes()
def replace(
    candidate: Candidate, original: Original, info: LayerInfo, group: LayerGroup, member: int, device: torch.device
) -> None:
    """Put an outsourced layer in the place of a linear one or of a convolution.

    It gets the hooks of that and what else others hung on it.
    """
    old = candidate.module
    like = torch.empty(0, dtype=candidate.weight().dtype, device=device)
    if isinstance(old, (nn.Conv1d, nn.Conv2d)):
        kind = OutsourcedConv1d if isinstance(old, nn.Conv1d) else OutsourcedConv2d
        _put(candidate, original, kind(info, old, group, like, tied=original.weight.shared))
        return
    new = OutsourcedLinear(info, old._parameters.get("bias"), group, member, like, tied=original.weight.shared)
    _put(candidate, original, new)


@own_modes()
def replace_embedding(
    candidate: Candidate, original: Original, info: LayerInfo, group: LayerGroup, device: torch.device
) -> None:
    """Put an outsourced embedding in the place of one, as ``replace`` does with linear layers."""
    old: Any = candidate.module
    like = torch.empty(0, dtype=candidate.weight().dtype, device=device)
    _put(candidate, original, OutsourcedEmbedding(info, group, old.padding_idx, like, tied=original.weight.shared))


def _put(candidate: Candidate, original: Original, new: Outsourced) -> None:
    old = candidate.module
    new.original = original
    original.own = frozenset(vars(new))
    move_hooks(old, new)
    for attribute, value in vars(old).items():
        vars(new).setdefault(attribute, value)
    setattr(candidate.parent, candidate.attribute, new.train(old.training))


class Restorer:
    """Puts linear layers back in place of a model's outsourced ones.

    Args:
        model: has the outsourced layers.
        frozen: whether the model was frozen since they were outsourced, as peft freezes it.
    """

    def __init__(self, model: nn.Module, frozen: bool) -> None:
        self.frozen = frozen
        self._stay = {
            f"{path}.{attribute}" if path else attribute: parameter
            for path, module in _modules(model)
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        }
        self._layers: dict[int, nn.Module] = {}
        self._weights: dict[int, nn.Parameter] = {}

    @own_modes()
    def take_back(
        self,
        parent: nn.Module,
        attribute: str,
        layer: Outsourced,
        weight: Tensor,
    ) -> None:
        """Put one layer, a token embedding or a convolution, back.

        Args:
            parent: what the outsourced layer hangs in.
            attribute: its name there.
            layer: that layer.
            weight: its weight, (out_features, in_features), float32.
        """
        original: Any = layer.original
        if id(original) not in self._layers:
            self._layers[id(original)] = self._layer(layer, original, weight)
        module = self._layers[id(original)]
        setattr(parent, attribute, module)
        if hasattr(parent, "fan_in_fan_out"):
            # A peft adapter merges into the layout of what it stands on.
            parent.fan_in_fan_out = is_conv1d(module)  # type: ignore[assignment]

    def _layer(self, layer: Outsourced, original: Original, weight: Tensor) -> nn.Module:
        module = original.shell
        value = weight.t().contiguous() if is_conv1d(module) else weight
        if isinstance(layer, OutsourcedConv):
            value = weight.reshape(layer.weight.full)
        module._parameters["weight"] = self._weight(original.weight, value, layer)
        if "bias" in module._parameters:
            module._parameters["bias"] = layer._parameters["bias"]
        take_additions(layer, module, original.own)
        move_hooks(layer, module)
        return module.train(layer.training)

    def _weight(self, kept: Weight, value: Tensor, layer: nn.Module) -> nn.Parameter:
        tied = [self._stay[name] for name in kept.tied_to if name in self._stay]
        for parameter in tied:
            if parameter.shape == value.shape:
                return parameter
        if id(kept) not in self._weights:
            like: Any = layer.weight
            value = value.to(device=like.device, dtype=like.dtype)
            self._weights[id(kept)] = nn.Parameter(value, requires_grad=kept.requires_grad and not self.frozen)
        return self._weights[id(kept)]


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module by the name that it has without adapters, the model itself among them."""
    return [("", model), *((bare_name(model, path), module) for path, _, _, module in walk(model))]


def shell_of(module: nn.Module, *weights: str) -> nn.Module:
    """A module like this one, that holds its hooks and everything else but the parameters of these names."""
    shell: nn.Module = object.__new__(type(module))
    vars(shell).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(shell)[name] = dict(vars(module)[name])
    for weight in weights:
        shell._parameters[weight] = None
    return shell


def take_additions(outsourced: nn.Module, module: nn.Module, own: frozenset[str]) -> None:
    """Have a restored module hold what others hung on the outsourced one, but for its hooks.

    Args:
        outsourced: what it stands for.
        module: the restored one, with its weight.
        own: attributes that belong to the outsourced one.
    """
    for name, value in vars(outsourced).items():
        if name not in own and name not in _HOOKS:
            vars(module)[name] = value
    for kept in ("_parameters", "_buffers", "_modules"):
        here = vars(module)[kept]
        for name, value in vars(outsourced)[kept].items():
            if name not in here and name != ANCHOR and not isinstance(value, AbsentTensor):
                here[name] = value


def refuse_replaced_forward(module: nn.Module, name: str) -> None:
    """Raise ``UnsupportedLayerError`` for a module that cannot be restored, since it would compute something else."""
    if "forward" in vars(module):
        raise UnsupportedLayerError(
            f"{name} cannot be restored: its forward was replaced on this instance since it was outsourced, as "
            "accelerate's hooks do: remove the hook first"
        )


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have a module hold the hooks of another."""
    # The dicts themselves, so that the handles which registering gave go on removing.
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
