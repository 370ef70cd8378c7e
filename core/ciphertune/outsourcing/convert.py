"""Outsource a model's linear layers, and take them back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ciphertune._support.own_modes import own_modes
from ciphertune.backend import WeightBits
from ciphertune.client.choice import Choice, choose
from ciphertune.client.session import Session
from ciphertune.errors import NothingOutsourcedError, OutsourcedWeightError
from ciphertune.linear import OutsourcedLinear
from ciphertune.outsourcing.calibration import Calibration
from ciphertune.outsourcing.convolution import OutsourcedConv, choose_convolutions, outsourced_convolutions
from ciphertune.outsourcing.embedding import (
    OutsourcedEmbedding,
    Table,
    choose_table,
    outsourced_embeddings,
)
from ciphertune.outsourcing.experts import (
    OutsourcedExperts,
    Products,
    outsourced_experts,
    replace_experts,
    restore_experts,
)
from ciphertune.outsourcing.group import LayerGroup
from ciphertune.outsourcing.holders import held_by_others
from ciphertune.outsourcing.layers import (
    Candidate,
    LayerChoice,
    choose_layers,
    device_of,
    linear_layers,
    refuse_some_experts,
    sibling_groups,
)
from ciphertune.outsourcing.outliers import keep_channels
from ciphertune.outsourcing.replacing import (
    Outsourced,
    Restorer,
    originals,
    refuse_replaced_forward,
    replace,
    replace_embedding,
)
from ciphertune.outsourcing.trained_whole import guard
from ciphertune.outsourcing.trial import frozen_from_birth
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.transport import LocalWorker
from ciphertune.weights import CodeSource, LayerInfo, LayerWeight, describe, quantize_layer
from ciphertune.worker import WeightStore, Worker

_log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def outsource(
    model: ModelT,
    to: str = "mlwe",
    layers: LayerChoice | Iterable[LayerChoice] | None = None,
    *,
    embeddings: bool = False,
    convolutions: bool | LayerChoice | Iterable[LayerChoice] = False,
    calibration: Calibration | None = None,
    plugins: PluginManager | None = None,
) -> ModelT:
    """Replace linear layers by ones whose weights are at the workers. The model is changed in place and returned.

    Works before or after ``peft.get_peft_model``. Either every chosen layer is replaced or, on any error, none.

    Args:
        model: any module with ``nn.Linear`` or transformers ``Conv1D`` layers.
        to: selection string: which encryption, and where the workers are.
        layers: which layers; see ``ciphertune.outsourcing.layers.choose_layers``. By default all but the output head,
            layers tied to something that stays, and layers that are being trained. ``"all"`` includes the output head.
        embeddings: whether the token embedding is at the workers, too: tokens are then looked up under encryption, by a
            request as long as the vocabulary for each. An output head that is the same table goes with it.
        convolutions: which ``nn.Conv1d`` and ``nn.Conv2d`` of one group are at the workers, too: True for those that
            save at least 32 multiplications for each value that is sent or comes back, or a choice as for ``layers``.
            Their patches are sent, so each input value as often as the kernel covers it: nine times for 3 by 3 and
            stride 1.
        calibration: from ``calibrate``: channels with outliers stay at the client, up to 8 a product.
        plugins: hook plugins; those of the process unless given.

    Raises:
        SelectionError, PluginError, SecurityError: about ``to``.
        UnknownLayerError, UnsupportedLayerError, NothingOutsourcedError: about ``layers`` and ``embeddings``.
        PrecisionError: a layer too large for the backend's guarantees.
        TransportError, WorkerError: no session could be opened.
        WeightsError: the encryption prepares itself from the codes, and they cannot be had.
    """
    manager = plugins if plugins is not None else plugin_manager()
    choice = choose(to)
    options = choice.options
    patched = choose_convolutions(model, convolutions)
    try:
        chosen = choose_layers(model, layers, manager, experts=options.experts)
    except NothingOutsourcedError:
        if layers is not None or not patched:
            raise
        chosen = []
    table = None
    if embeddings:
        chosen, table = choose_table(model, chosen)
    sizes = [candidate.weight().shape[1] for candidate in chosen]
    groups = sibling_groups(chosen, sizes, share=options.share_inputs, experts=options.experts)
    # Each convolution makes patches of its own of what it gets.
    groups += [(i,) for i in range(len(chosen), len(chosen) + len(patched))]
    chosen = [*chosen, *patched]
    held = [*chosen, table.places[0]] if table is not None and table.tied is None else chosen
    blocks = [*groups, *((i,) for i in range(len(chosen), len(held)))]
    local = not choice.transport.remote
    infos, store = quantize_all(held, blocks, choice.backend.weight_bits, keep=local, calibration=calibration)
    device = device_of(held)
    worker = None if choice.transport.remote else Worker(store, device)
    codes = ModelCodes(held, choice.backend.weight_bits) if choice.transport.remote else None
    return attach(model, chosen, infos, groups, choice, worker, device, manager, codes, table)


class ModelCodes:
    """``CodeSource`` of a model's own layers, quantized again one at a time.

    Args:
        chosen: the layers.
        bits: of a code.
    """

    lasting = False

    def __init__(self, chosen: Sequence[Candidate], bits: WeightBits | None) -> None:
        self._chosen = {candidate.name: candidate for candidate in chosen}
        self._bits = bits
        self._last: tuple[str, Tensor] | None = None

    def read(self, layer: LayerInfo, start: int, stop: int) -> Tensor:
        """See ``CodeSource.read``."""
        if self._last is None or self._last[0] != layer.name:
            self._last = layer.name, quantize_layer(layer.name, self._chosen[layer.name].weight(), self._bits).codes
        return self._last[1][start:stop]

    def distrust(self, layer: LayerInfo, start: int, stop: int) -> bool:
        """See ``CodeSource.distrust``: there is one model."""
        return False


@own_modes()
def quantize_all(
    chosen: Sequence[Candidate],
    groups: Sequence[tuple[int, ...]],
    bits: WeightBits | None,
    *,
    keep: bool,
    calibration: Calibration | None = None,
) -> tuple[list[LayerInfo], WeightStore]:
    """Quantize layers: return what a client knows of them, and a store for the worker.

    Args:
        chosen: the layers.
        groups: those evaluated together, as indices; every layer is in exactly one.
        bits: of a weight at the worker, None for float32.
        keep: whether the weights are wanted too; the store is empty otherwise.
        calibration: what channels the client keeps follows from; none are without it.

    Raises:
        LayerError: a weight is not finite.
    """
    store = WeightStore()
    infos: dict[int, LayerInfo] = {}
    for group in groups:
        weights = [quantize_layer(chosen[i].name, chosen[i].weight(), bits) for i in group]
        members = [describe(chosen[i].name, weight) for i, weight in zip(group, weights, strict=True)]
        members = keep_channels(members, [chosen[i].weight() for i in group], calibration)
        infos |= dict(zip(group, members, strict=True))
        if keep:
            codes = [weight.codes for weight in weights]
            store.add([infos[i].shard() for i in group], codes[0] if len(codes) == 1 else torch.cat(codes))
    return [infos[i] for i in range(len(chosen))], store


def attach(
    model: ModelT,
    chosen: Sequence[Candidate],
    infos: Sequence[LayerInfo],
    groups: Sequence[tuple[int, ...]],
    choice: Choice,
    worker: LocalWorker | None,
    device: torch.device,
    plugins: PluginManager,
    codes: CodeSource | None = None,
    table: Table | None = None,
) -> ModelT:
    """Open a session and put outsourced layers in the place of linear ones.

    Args:
        model: changed in place once the session is open; on any error it is as before.
        chosen: its layers to replace, whose weights may be on the meta device.
        infos: of each of them, in order; behind them that of a table which is none of them.
        groups: layers evaluated together, as indices; every layer is in exactly one.
        choice: from ``choose``.
        worker: the embedded worker, for a transport that stays in this process.
        device: where the client encrypts and decrypts, and where the layers say their weight is.
        plugins: hook plugins.
        codes: where the layers' codes can be read; the workers if not given.
        table: the token embedding, where that is replaced, too.

    Raises:
        PrecisionError, TransportError, WorkerError, WeightsError: as ``outsource``.
    """
    refuse_some_experts(chosen)
    if choice.options.experts == "routed":
        _log.warning(
            "experts=routed: workers see how many tokens each expert of a mixture gets, which follows the data"
        )
    # Members of a group are also groups of their own, for models in which siblings turn out to differ in input.
    singles = [(i,) for group in groups if chosen[group[0]].part is None for i in group]
    evaluated = list(dict.fromkeys([*groups, *singles]))
    row = len(chosen) if table is None or table.tied is None else table.tied
    session = Session(choice, infos, evaluated, worker, device, plugins, codes, () if table is None else (row,))
    places = () if table is None else table.places
    layers = [i for i, candidate in enumerate(chosen) if candidate.part is None]
    kept = originals(model, [*(chosen[i] for i in layers), *places])
    original_of = dict(zip(layers, kept[: len(layers)], strict=True))
    number_of = {group: number for number, group in enumerate(evaluated)}
    for group in groups:
        if chosen[group[0]].part is not None:
            continue
        handle = LayerGroup(session, number_of[group], [number_of[i,] for i in group])
        for member, i in enumerate(group):
            replace(chosen[i], original_of[i], infos[i], handle, member, device)
    put_experts(chosen, infos, number_of, session, device)
    lookup = LayerGroup(session, len(evaluated), [len(evaluated)])
    for place, original in zip(places, kept[len(layers) :], strict=True):
        replace_embedding(place, original, infos[row], lookup, device)
    linear = outsourced_layers(model)
    if next(model.parameters(), None) is None and linear:
        linear[0].anchor()
    guard()
    _refuse_full_save(model)
    return model


def put_experts(
    chosen: Sequence[Candidate],
    infos: Sequence[LayerInfo],
    number_of: Mapping[tuple[int, ...], int],
    session: Session,
    device: torch.device,
) -> None:
    """Put outsourced experts in the place of modules with stacked weights.

    Args:
        chosen: layers, experts' among them.
        infos: of each of them, and perhaps more.
        number_of: the number that each group, of indices into ``chosen``, has in the session.
        session: evaluates the groups.
        device: where the weights are said to be.
    """
    members: dict[str, list[int]] = {}
    for i, candidate in enumerate(chosen):
        if candidate.part is not None:
            members.setdefault(candidate.place, []).append(i)
    for own in members.values():
        within = set(own)
        sides: dict[str, list[int]] = {"inputs": [], "outputs": []}
        for group, number in number_of.items():
            part = chosen[group[0]].part if group[0] < len(chosen) else None
            if part is not None and group[0] in within:
                sides[part.side].append(number)
        products = Products(session, tuple(sides["inputs"]), tuple(sides["outputs"]))
        replace_experts([chosen[i] for i in own], [infos[i] for i in own], products, device)


def restore(model: ModelT) -> ModelT:
    """Put linear layers back in place of outsourced ones, of the classes that they had, and close the session.

    A session that copies of the model compute with (``copy.deepcopy``) stays open for them.

    Only for a session whose worker is in this process. The weights are what the worker held: exact under ``clear``
    (but float64 comes back as float32 had it), rounded to 8 or 16 bits otherwise; a weight tied to a parameter that
    stayed is that parameter again. Weights that were trainable are so again, unless the model was frozen since. The
    model is changed in place and returned.

    Raises:
        NothingOutsourcedError: the model has no outsourced layer.
        OutsourcedWeightError: the weights are on other machines.
        UnsupportedLayerError: the ``forward`` of an outsourced layer was replaced on the instance.
    """
    sessions = _sessions(model)
    held = {session: session.worker.weights for session in sessions if isinstance(session.worker, Worker)}
    if len(held) != len(sessions):
        raise OutsourcedWeightError("the weights are on other machines: load the original model instead")
    away = [*_outsourced(model), *outsourced_experts(model)]
    for each in away:
        refuse_replaced_forward(each, each.name)
    holders = [each.products if isinstance(each, OutsourcedExperts) else each.group for each in away]
    frozen = {id(p) for p in model.parameters() if not p.requires_grad and p.numel() > 0}
    restorer = Restorer(model, frozen=bool(frozen) and not frozen <= frozen_from_birth(model))
    for parent in list(model.modules()):
        for attribute, module in list(parent._modules.items()):
            if isinstance(module, (OutsourcedLinear, OutsourcedEmbedding, OutsourcedConv)):
                if (session := _session(module)) is not None:
                    weight = LayerWeight(held[session][module.name], module.info.scale)
                    restorer.take_back(parent, attribute, module, weight.dequantize())
            elif isinstance(module, OutsourcedExperts):
                codes = held[module.products.session]
                whole = [LayerWeight(codes[info.name], info.scale).dequantize() for info in module.infos]
                restore_experts(parent, attribute, module, whole, restorer.frozen)
    _base(model).__dict__.pop("save_pretrained", None)
    for session in sessions:
        if not held_by_others(session, holders):
            session.close()
    return model


def outsourced_layers(model: nn.Module) -> list[OutsourcedLinear]:
    """The outsourced layers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, OutsourcedLinear)]


def session_of(model: nn.Module) -> Session:
    """The session that a model's outsourced layers use; the first, if it was outsourced in several calls.

    Raises:
        NothingOutsourcedError: the model has no outsourced layer.
    """
    return _sessions(model)[0]


@dataclasses.dataclass(frozen=True)
class Share:
    """Share of a model that is at the workers.

    Attributes:
        outsourced: weights of outsourced layers.
        at_client: parameters that stay, adapters included.
        trainable: those of them that are trained.
        layers: number of outsourced layers, a token embedding with a table of its own among them, and each expert's of
            a mixture.
    """

    outsourced: int
    at_client: int
    trainable: int
    layers: int

    @property
    def fraction(self) -> float:
        """Outsourced weights over all."""
        return self.outsourced / max(self.outsourced + self.at_client, 1)


def share(model: nn.Module) -> Share:
    """Count what is at the workers and what stays. Libraries that count parameters miss outsourced weights."""
    layers = {(_session(each) or id(each.group), each.name): each.info for each in _outsourced(model)}
    for experts in outsourced_experts(model):
        layers |= {(experts.products.session, info.name): info for info in experts.infos}
    parameters = list(model.parameters())
    return Share(
        outsourced=sum(info.in_features * info.out_features for info in layers.values()),
        at_client=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        layers=len(layers),
    )


def validate(model: nn.Module) -> dict[str, str]:
    """Linear layers, and stacked weights, that cannot be outsourced, by dotted path, each with the reason."""
    return {c.name: c.obstacle for c in linear_layers(model) if c.obstacle is not None}


def sessions_of(model: nn.Module) -> list[Session]:
    """The sessions that a model's outsourced layers use; none for a model that has none."""
    found = [_session(layer) for layer in _outsourced(model)]
    found += [each.products.session for each in outsourced_experts(model)]
    return list(dict.fromkeys(session for session in found if session is not None))


def _sessions(model: nn.Module) -> list[Session]:
    sessions = sessions_of(model)
    if not sessions:
        raise NothingOutsourcedError("the model has no outsourced layer: call ciphertune.outsource(model, to=…) first")
    return sessions


def _outsourced(model: nn.Module) -> list[Outsourced]:
    return [*outsourced_layers(model), *outsourced_convolutions(model), *outsourced_embeddings(model)]


def _session(layer: Outsourced) -> Session | None:
    """The session that evaluates a layer; None for an ``Evaluator`` that has none."""
    return layer.group.session if isinstance(layer.group, LayerGroup) else None


def _refuse_full_save(model: Any) -> None:
    """Refuse to save the full model, which would load with random weights silently; adapters save as before."""
    base = _base(model)
    if hasattr(base, "save_pretrained"):
        base.save_pretrained = _refuse_save


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refuse_save(*_: Any, **__: Any) -> NoReturn:
    raise OutsourcedWeightError(
        "this model's weights are at the workers, so it cannot be saved whole. Save the adapter "
        "(peft_model.save_pretrained) and load it on the original model, or call ciphertune.restore(model) first"
    )
