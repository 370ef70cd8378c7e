"""Choice of the layers that are outsourced: which can be, and which of them a caller means."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ciphertune._support.suggestions import closest
from ciphertune.errors import NothingOutsourcedError, UnknownLayerError, UnsupportedLayerError
from ciphertune.linear import OutsourcedLinear
from ciphertune.outsourcing.heads import outside_base_models
from ciphertune.outsourcing.obstacles import is_conv1d, obstacle, stacked_obstacle
from ciphertune.outsourcing.stacked import Layout, Part, layout_of, stacked_parameters
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
    """A linear layer of a model, or what is one of an expert whose weights are stacked with the others'.

    Attributes:
        name: dotted path in the model as it was before any adapter.
        parent, attribute: where the module hangs in the model as it is now.
        module: the layer, or the module with all experts.
        obstacle: why it cannot be outsourced, None if it can.
        stays: why it is left at the client unless named, None if there is no reason.
        part: which part of the module's parameters this is; None for a layer.
    """

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    obstacle: str | None
    stays: str | None
    part: Part | None = None

    @property
    def place(self) -> str:
        """The module's path, as ``name`` is one."""
        if self.part is None:
            return self.name
        number = "" if self.part.expert is None else f"{self.part.expert}."
        return self.name.removesuffix(f".{number}{self.part.parameter}")

    @property
    def tensor(self) -> str:
        """What the weight, or the parameter that it is a part of, is called in a state dict."""
        return f"{self.place}.{'weight' if self.part is None else self.part.parameter}"

    def parameter(self) -> Tensor:
        """The parameter that the weight is, or is a part of."""
        found = self.module.weight if self.part is None else self.module.get_parameter(self.part.parameter)
        assert isinstance(found, Tensor)
        return found

    def matrix(self, parameter: Tensor) -> Tensor:
        """This layer's weight, (out_features, in_features), of what ``parameter`` gives."""
        if self.part is not None:
            return self.part.matrix(parameter)
        if parameter.dim() > 2:  # a convolution: its patches are the inputs
            return parameter.flatten(1)
        return parameter.t() if is_conv1d(self.module) else parameter

    def weight(self) -> Tensor:
        """The weight in the order (out_features, in_features)."""
        return self.matrix(self.parameter())


Experts = Literal["all", "routed"]
"""What is sent to a mixture's experts: every token to each, or to each those that routing chose."""

_READ = "the model's own code reads its weight"
ROUTED = (
    "it is an expert's that gets what routing chose, and workers would see how many tokens that is: experts=routed "
    "sends it all the same"
)
"""Why layers stay that are an expert's of their own."""
_WORTH_A_WORD = 0.1


def linear_layers(
    model: nn.Module, *, allow_meta: bool = False, trial: bool = True, experts: Experts = "all"
) -> list[Candidate]:
    """List every linear layer of a model that is not an adapter's own, in module order.

    Experts whose weights are stacked in one parameter count as layers of their own, each with the features of a token
    as its input; those that lead back to them, too.

    Args:
        model: any module.
        allow_meta: take layers without weights, on the meta device, as well.
        trial: find out which weights the model's own code reads.
        experts: whether layers may be outsourced that get what routing chose.
    """
    head = _output_head(model)
    shared = _shared_weights(model)
    outside = outside_base_models(model)
    mixed = meant_to_train(model)
    read = weights_read(model) if trial else set()
    routed = _listed_experts(model) if experts == "all" else set()
    found: list[Candidate] = []
    taken: set[str] = set()
    for path, parent, attribute, module in walk(model):
        if isinstance(module, OutsourcedLinear):
            continue
        name = bare_name(model, path)
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            layout = layout_of(module)
            if layout is None and any(name.startswith(f"{place}.") for place in taken):
                continue
            found += _stacked(name, parent, attribute, module, layout, mixed, allow_meta, id(module) in outside)
            if layout is not None:
                taken.add(name)
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
        why = obstacle(module, parent, mixed, allow_meta)
        if why is None and id(module) in routed:
            why = ROUTED
        found.append(Candidate(name, parent, attribute, module, why, stays))
    return found


def _stacked(
    name: str,
    parent: nn.Module,
    attribute: str,
    module: nn.Module,
    layout: Layout | None,
    mixed: bool,
    allow_meta: bool,
    outside: bool,
) -> list[Candidate]:
    """The candidates in a module with stacked weights; none for any other module."""
    if layout is None:
        own = [Part(parameter) for parameter in stacked_parameters(module)]
        kind = type(module).__name__
        why: str | None = f"it holds several matrices, with which {kind} computes in code of its own"
    else:
        own = [Part(parameter, expert, layout) for parameter in layout.parameters for expert in range(layout.experts)]
        why = stacked_obstacle(module, parent, layout, mixed, allow_meta)
    found = []
    for part in own:
        number = "" if part.expert is None else f"{part.expert}."
        trained = mixed and module.get_parameter(part.parameter).requires_grad
        stays = "it is outside of the base model" if outside else "it is being trained" if trained else None
        found.append(Candidate(f"{name}.{number}{part.parameter}", parent, attribute, module, why, stays, part))
    return found


def _listed_experts(model: nn.Module) -> set[int]:
    """Identities of linear layers of experts that are modules of their own, and get what routing chose."""
    found: set[int] = set()
    for path, _, _, module in walk(model):
        last = path.rpartition(".")[2].lower()
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        if listed and "expert" in last and "shared" not in last:
            found |= {id(inner) for inner in module.modules()}
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
    experts: Experts = "all",
) -> list[Candidate]:
    """Choose the layers that a caller means.

    Args:
        model: any module.
        choice: None for every layer that has no reason to stay, unless a plugin chooses; ``"all"``, alone or in a list,
            for every layer that can be outsourced, output head included; or names, patterns, types and predicates.
        plugins: asked when choice is None.
        allow_meta: take layers without weights, on the meta device, as well.
        experts: as of ``linear_layers``.

    Raises:
        UnknownLayerError: a name or pattern matches nothing.
        UnsupportedLayerError: a layer named exactly cannot be outsourced, or some of a mixture's experts are meant.
        NothingOutsourcedError: nothing is left.
    """
    candidates = linear_layers(model, allow_meta=allow_meta, experts=experts)
    possible = [c for c in candidates if c.obstacle is None]
    if choice is None:
        free = [c for c in possible if c.stays is None]
        _tell_what_stays(candidates)
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
    refuse_some_experts(chosen)
    return chosen


def refuse_some_experts(chosen: Sequence[Candidate]) -> None:
    """Raise ``UnsupportedLayerError`` where some parts of a mixture's stacked weights are chosen and others are not."""
    counts: dict[str, int] = {}
    for candidate in chosen:
        if candidate.part is not None and candidate.part.layout is not None:
            counts[candidate.place] = counts.get(candidate.place, 0) + 1
            whole = candidate.part.layout.experts * len(candidate.part.layout.parameters)
            if counts[candidate.place] == whole:
                del counts[candidate.place]
    if counts:
        place = next(iter(counts))
        raise UnsupportedLayerError(
            f"{place} cannot be outsourced in part: all of its experts' weights go to the workers, or none. Name "
            f"{place!r} whole, or leave it out"
        )


def _tell_what_stays(candidates: Sequence[Candidate]) -> None:
    """Warn of layers that stay unexpectedly: whose weights are read, and what comes to more than a tenth of all."""
    read = [c for c in candidates if c.obstacle is None and c.stays == _READ]
    heads = [c for c in candidates if c.stays is not None and c.stays != _READ]
    kept = [c for c in candidates if c.obstacle is not None and c not in heads]
    share = _weights(kept) / max(_weights([c for c in candidates if c not in heads]), 1)
    if share > _WORTH_A_WORD:
        by_reason: dict[str, list[Candidate]] = {}
        for candidate in kept:
            by_reason.setdefault(str(candidate.obstacle), []).append(candidate)
        told = "; ".join(f"{_some(names)}: {why}" for why, names in by_reason.items())
        warnings.warn(
            f"{100 * share:.0f}% of the weights of the model's layers are left at the client: {told}",
            UserWarning,
            stacklevel=4,
        )
    if read:
        warnings.warn(f"left at the client: {_some(read)}: {_READ}", UserWarning, stacklevel=4)


def _weights(candidates: Sequence[Candidate]) -> int:
    return sum(0 if is_lazy(c.parameter()) else c.weight().numel() for c in candidates)


def _some(candidates: Sequence[Candidate]) -> str:
    more = f" and {len(candidates) - 3} more" if len(candidates) > 3 else ""
    return ", ".join(candidate.name for candidate in candidates[:3]) + more


def sibling_groups(
    candidates: Sequence[Candidate], formats: Sequence[object], *, share: bool = True, experts: Experts = "all"
) -> list[tuple[int, ...]]:
    """Group indices of layers that read the same input by the names they have; every layer is in exactly one group.

    Args:
        candidates: the chosen layers.
        formats: per layer, anything that must be equal within a group.
        share: whether layers are grouped at all. Experts with stacked weights are in any case.
        experts: "all" to have one group of all experts of a module for each side, "routed" one for each expert, as
            experts with inputs of their own have in any case.
    """
    if any(c.part is not None for c in candidates):
        return _groups_with_experts(candidates, formats, share, experts)
    if not share:
        return [(i,) for i in range(len(candidates))]
    by_place = {(c.name.rpartition(".")[0], c.name.rpartition(".")[2]): i for i, c in enumerate(candidates)}
    group_of: dict[int, tuple[int, ...]] = {}
    for parent in {place[0] for place in by_place}:
        for names in SIBLINGS:
            members = [by_place[parent, name] for name in names if (parent, name) in by_place]
            members = [i for i in members if formats[i] == formats[members[0]] and i not in group_of]
            if len(members) > 1:
                group_of.update(dict.fromkeys(members, tuple(members)))
    return list(dict.fromkeys(group_of.get(i, (i,)) for i in range(len(candidates))))


def _groups_with_experts(
    candidates: Sequence[Candidate], formats: Sequence[object], share: bool, experts: Experts
) -> list[tuple[int, ...]]:
    layers = [i for i, c in enumerate(candidates) if c.part is None]
    of_layers = sibling_groups([candidates[i] for i in layers], [formats[i] for i in layers], share=share)
    groups = [tuple(layers[i] for i in group) for group in of_layers]
    together: dict[tuple[object, ...], list[int]] = {}
    for i, candidate in enumerate(candidates):
        if candidate.part is not None:
            apart = candidate.part.layout is not None and candidate.part.layout.apart
            expert = candidate.part.expert if experts == "routed" or apart else None
            together.setdefault((candidate.place, candidate.part.side, expert), []).append(i)
    return sorted([*groups, *(tuple(members) for members in together.values())])


def group_name(names: Sequence[str]) -> str:
    """What a group of layers is called in a plan: the last parts of their names, each once.

    >>> group_name(["a.q_proj", "a.k_proj"]), group_name(["m.experts.0.w1", "m.experts.1.w1"])
    ('q_proj+k_proj', 'w1 ×2')
    """
    ends: dict[str, int] = {}
    for name in names:
        end = name.rpartition(".")[2]
        ends[end] = ends.get(end, 0) + 1
    return "+".join(end if count == 1 else f"{end} ×{count}" for end, count in ends.items())


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
        names = [candidate.name] if candidate.part is None else [candidate.name, candidate.place, candidate.tensor]
        return any(
            name == choice or name.endswith("." + choice) or ("*" in choice and fnmatch.fnmatchcase(name, choice))
            for name in names
        )
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
