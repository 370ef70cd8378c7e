"""Choice of the layers that are outsourced: which can be, and which of them a caller means."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ciphertune._support.suggestions import closest
from ciphertune.errors import NothingOutsourcedError, UnknownLayerError, UnsupportedLayerError
from ciphertune.linear import OutsourcedLinear
from ciphertune.outsourcing.heads import outside_base_models
from ciphertune.outsourcing.obstacles import is_conv1d, obstacle
from ciphertune.outsourcing.trial import frozen_from_birth, weights_read
from ciphertune.outsourcing.walk import bare_name, walk
from ciphertune.plugins.manager import PluginManager

LayerChoice = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A name, the end of a name, a ``*`` pattern, a module type, or a predicate of name and module."""

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names under one parent that usually read the same input. A wrong guess costs one product, never correctness."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A linear layer of a model.

    Attributes:
        name: dotted path in the model as it was before any adapter.
        parent, attribute: where the module hangs in the model as it is now.
        module: the layer.
        obstacle: why it cannot be outsourced, None if it can.
        stays: why it is left at the client unless named, None if there is no reason.
    """

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    obstacle: str | None
    stays: str | None

    def weight(self) -> Tensor:
        """The weight in the order (out_features, in_features)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if weight.dim() > 2:  # a convolution: its patches are the inputs
            return weight.flatten(1)
        return weight.t() if is_conv1d(self.module) else weight


_READ = "the model's own code reads its weight"


def linear_layers(model: nn.Module, *, allow_meta: bool = False, trial: bool = True) -> list[Candidate]:
    """List every linear layer of a model that is not an adapter's own, in module order.

    Args:
        model: any module.
        allow_meta: take layers without weights, on the meta device, as well.
        trial: find out which weights the model's own code reads.
    """
    head = _output_head(model)
    shared = _shared_weights(model)
    outside = outside_base_models(model)
    mixed = meant_to_train(model)
    read = weights_read(model) if trial else set()
    found = []
    for path, parent, attribute, module in walk(model):
        if isinstance(module, OutsourcedLinear) or not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        weight = module.weight
        stays = None
        if head is not None and weight is head.weight:
            stays = "it is the model's output head"
        elif id(weight) in shared:
            stays = "its weight is tied to another module's"
        elif id(module) in outside:
            stays = "it is outside of the base model, as a head is that a task trains"
        elif mixed and weight.requires_grad:
            stays = "it is being trained"
        elif id(module) in read:
            stays = _READ
        name = bare_name(model, path)
        found.append(Candidate(name, parent, attribute, module, obstacle(module, parent, mixed, allow_meta), stays))
    return found


def meant_to_train(model: nn.Module) -> bool:
    """Whether a model has frozen parameters and others, so that those others are meant to be trained."""
    parameters = list(model.parameters())
    frozen = {id(p) for p in parameters if not p.requires_grad}
    return 0 < len(frozen) < len(parameters) and not frozen <= frozen_from_birth(model)


def choose_layers(
    model: nn.Module,
    choice: LayerChoice | Iterable[LayerChoice] | None,
    plugins: PluginManager,
    *,
    allow_meta: bool = False,
) -> list[Candidate]:
    """Choose the layers that a caller means.

    Args:
        model: any module.
        choice: None for every layer that has no reason to stay, unless a plugin chooses; ``"all"``, alone or in a list,
            for every layer that can be outsourced, output head included; or names, patterns, types and predicates.
        plugins: asked when choice is None.
        allow_meta: take layers without weights, on the meta device, as well.

    Raises:
        UnknownLayerError: a name or pattern matches nothing.
        UnsupportedLayerError: a layer named exactly cannot be outsourced.
        NothingOutsourcedError: nothing is left.
    """
    candidates = linear_layers(model, allow_meta=allow_meta)
    possible = [c for c in candidates if c.obstacle is None]
    if choice is None:
        free = [c for c in possible if c.stays is None]
        read = [c.name for c in possible if c.stays == _READ]
        if read:
            more = f" and {len(read) - 3} more" if len(read) > 3 else ""
            warnings.warn(f"left at the client: {', '.join(read[:3])}{more}: {_READ}", UserWarning, stacklevel=3)
        answer = plugins.gate("ciphertune_select_layers", model=model, candidates=[c.name for c in free])
        answer = [answer] if isinstance(answer, str) else answer
        chosen = free if answer is None else matching(candidates, list(answer))
    else:
        single = isinstance(choice, (str, type)) or callable(choice)
        choices: list[LayerChoice] = [choice] if single else list(choice)  # type: ignore[arg-type,list-item]
        chosen = possible if choices == ["all"] else matching(candidates, choices)
    if not chosen:
        reasons = "; ".join(f"{c.name}: {c.obstacle or c.stays or 'not chosen'}" for c in candidates[:5])
        raise NothingOutsourcedError(
            "no layer is left to outsource: "
            + (reasons or "the model has no nn.Linear or Conv1D layer that is not outsourced already")
        )
    return chosen


def sibling_groups(candidates: Sequence[Candidate], formats: Sequence[object]) -> list[tuple[int, ...]]:
    """Group indices of layers that read the same input by the names they have; every layer is in exactly one group.

    Args:
        candidates: the chosen layers.
        formats: per layer, anything that must be equal within a group.
    """
    by_place = {(c.name.rpartition(".")[0], c.name.rpartition(".")[2]): i for i, c in enumerate(candidates)}
    group_of: dict[int, tuple[int, ...]] = {}
    for parent in {place[0] for place in by_place}:
        for names in SIBLINGS:
            members = [by_place[parent, name] for name in names if (parent, name) in by_place]
            members = [i for i in members if formats[i] == formats[members[0]] and i not in group_of]
            if len(members) > 1:
                group_of.update(dict.fromkeys(members, tuple(members)))
    return list(dict.fromkeys(group_of.get(i, (i,)) for i in range(len(candidates))))


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except NotImplementedError:  # transformers' way to say that there are none
        head = None
    return head if isinstance(head, nn.Module) and hasattr(head, "weight") else None


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that hang in more than one place of the model."""
    places: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                places[id(parameter)] = places.get(id(parameter), 0) + 1
    return {identity for identity, count in places.items() if count > 1}


def matching(
    candidates: Sequence[Candidate], choices: Sequence[LayerChoice], kind: str = "linear layer"
) -> list[Candidate]:
    """The candidates that names, patterns, types and predicates mean, in module order.

    Args:
        candidates: to choose from.
        choices: what is meant.
        kind: what the candidates are, for messages.

    Raises:
        UnknownLayerError: a name or pattern matches nothing.
        UnsupportedLayerError: a layer named exactly cannot be outsourced.
    """
    picked: dict[str, Candidate] = {}
    for choice in choices:
        matches = [c for c in candidates if _matches(choice, c)]
        if not matches and isinstance(choice, str):
            raise UnknownLayerError(f"no {kind} matches {choice!r}; {closest(choice, _endings(candidates))}")
        broad = not isinstance(choice, str) or "*" in choice
        for candidate in matches:
            if candidate.obstacle is None:
                picked[candidate.name] = candidate
            elif not broad:
                raise UnsupportedLayerError(f"{candidate.name} cannot be outsourced: {candidate.obstacle}")
    return [c for c in candidates if c.name in picked]


def _matches(choice: LayerChoice, candidate: Candidate) -> bool:
    if isinstance(choice, str):
        name = candidate.name
        return name == choice or name.endswith("." + choice) or ("*" in choice and fnmatch.fnmatchcase(name, choice))
    if isinstance(choice, type):
        return isinstance(candidate.module, choice)
    return bool(choice(candidate.name, candidate.module))


def _endings(candidates: Sequence[Candidate]) -> set[str]:
    return {c.name.rpartition(".")[2] for c in candidates}


def device_of(candidates: Sequence[Candidate]) -> torch.device:
    """The one device that the layers' weights are on. Raises ``UnsupportedLayerError`` where they are on several."""
    devices = {c.weight().device for c in candidates}
    if len(devices) != 1:
        listed = ", ".join(sorted(str(device) for device in devices))
        raise UnsupportedLayerError(f"the layers are on several devices ({listed}): move the model to one")
    return devices.pop()
