"""Products of a training step of an outsourced model, and the workers that evaluate them. No weight is loaded."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ciphertune.backend import DIRECTIONS, Backend, Direction, LinearMap
from ciphertune.bundle.placement import Placement
from ciphertune.client.choice import Choice, choose
from ciphertune.client.placement import Piece, place
from ciphertune.errors import ConfigError, NothingOutsourcedError
from ciphertune.models.known import skeleton
from ciphertune.outsourcing.convolution import choose_convolutions, convolutions
from ciphertune.outsourcing.embedding import Table, choose_table, tokens_at_once
from ciphertune.outsourcing.layers import Candidate, choose_layers, group_name, linear_layers, sibling_groups
from ciphertune.outsourcing.stacked import layout_of
from ciphertune.planning.rows import rows_of_picture, rows_of_token
from ciphertune.plugins.manager import plugin_manager
from ciphertune.weights import LayerInfo, Shard, group_map, lookup_map

_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
"""What configurations call the number of experts that a token uses."""


@dataclasses.dataclass(frozen=True)
class PlannedGroup:
    """Layers that are evaluated as one product.

    Attributes:
        layers: their last names, joined by +.
        forward, whole_backward: the maps of all of them.
        pieces: how it is cut, and who holds what.
        backward: whether a gradient of its input is asked for.
        lookup: whether it is a table, whose products are lookups: of the direction backward, in the forward pass.
        tied: whether its weight is that of another group, too.
        most: tokens of a pass that reach it at most; None for all of them.
        transposed: whether it leads from experts back to tokens: its products of the forward pass have the direction
            backward, and the others forward.
        at_once: tokens of one product at most; None for no limit.
        share: of a pass' tokens that reach it, where routing is sent.
        rows: of it for each token, or for each picture of a step of pictures.
        below: whether it is below the first block with adapters, so that its outputs need not be computed again.
    """

    layers: str
    forward: LinearMap
    whole_backward: LinearMap
    pieces: tuple[Piece, ...]
    backward: bool
    lookup: bool = False
    tied: bool = False
    most: int | None = None
    transposed: bool = False
    at_once: int | None = None
    share: float = 1.0
    below: bool = False
    rows: float = 1.0

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions of its products in a step, that of the forward pass first."""
        if self.lookup:
            return ("backward",)
        ways: tuple[Direction, Direction] = ("backward", "forward") if self.transposed else ("forward", "backward")
        return ways[: 1 + self.backward]

    def parts(self, tokens: int) -> list[int]:
        """Tokens of each product, for so many in all."""
        tokens = tokens if self.most is None else min(tokens, self.most)
        tokens = max(1, round(tokens * self.rows)) if self.rows != 1.0 else math.ceil(tokens * self.share)
        most = self.at_once or (tokens_at_once(self.forward.out_features) if self.lookup else tokens)
        return [min(most, tokens - done) for done in range(0, tokens, most)]

    @property
    def cut(self) -> bool:
        """Whether results have to be put together."""
        return len(self.pieces) > 1 or not self.pieces[0].whole

    def traffic(self, direction: Direction, backend: Backend, tokens: int) -> list[tuple[int, int]]:
        """Bytes up and down of each request of a product. Raises ``ConfigError`` where the backend does not say."""
        found = []
        whole = self.forward if direction == "forward" else self.whole_backward
        for piece in self.pieces:
            sent = backend.piece_traffic(whole, piece.map(direction), tokens)
            if sent is None:
                raise ConfigError(f"{backend.name!r} does not say what it sends, so it cannot be planned")
            found.append(sent)
        return found


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """A model that is outsourced in thought.

    Attributes:
        model: without weights.
        choice: the selection.
        chosen: the layers that are outsourced, but for those that are refused.
        table: the token embedding, if that is outsourced.
        groups: as they are evaluated, in order.
        singles: the same, without sharing of inputs.
        refused: why, by name.
        worker_bytes: of the weights that the fullest worker holds.
        named: names of all layers that were chosen.
    """

    model: nn.Module
    choice: Choice
    chosen: list[Candidate]
    table: Table | None
    groups: list[PlannedGroup]
    singles: list[PlannedGroup]
    refused: dict[str, str]
    worker_bytes: int
    named: set[str]


@dataclasses.dataclass(frozen=True)
class Patches:
    """Convolutions of a plan, and what their patches follow from.

    Attributes:
        convolutions: which of them are outsourced; see ``ciphertune.outsource``.
        length: tokens of a sequence.
        pictures: whether a step is of pictures, and not of tokens.
        size: pixels of each side of a picture; None for what the model's configuration says.
    """

    convolutions: bool | tuple[str, ...] = False
    length: int = 256
    pictures: bool = False
    size: int | None = None

    def rows(self, model: nn.Module, layers: Sequence[str], patched: Sequence[str]) -> dict[str, float]:
        """Rows of layers' products for each picture, or of convolutions' for each token. Raises ``ConfigError``."""
        if self.pictures:
            return rows_of_picture(model, list(dict.fromkeys(layers)), self.size)
        return rows_of_token(model, patched, self.length) if patched else {}


class Products:
    """The products of a model's step, whoever evaluates them; arguments as of ``make_plan``.

    Raises:
        ConfigError: the model's configuration cannot be read.
        SelectionError, LayerError: about ``to``, ``layers`` and ``embeddings``.
    """

    def __init__(
        self,
        model: str | nn.Module,
        to: str,
        layers: Sequence[str] | str | None,
        targets: Sequence[str],
        embeddings: bool = False,
        first_block: int = 0,
        patches: Patches = Patches(),
    ) -> None:
        self._choice = choice = choose(to)
        self._model = built = skeleton(model) if isinstance(model, str) else model
        options = choice.options
        patched = choose_convolutions(built, patches.convolutions, allow_meta=True)
        try:
            chosen = choose_layers(built, layers, plugin_manager(), allow_meta=True, experts=options.experts)
        except NothingOutsourcedError:
            if layers is not None or not patched:
                raise
            chosen = []
        table = None
        if embeddings:
            chosen, table = choose_table(built, chosen, allow_meta=True)
        own = table.places[:1] if table is not None and table.tied is None else ()
        linear, chosen = chosen, [*chosen, *patched]
        self._chosen = chosen
        self._infos = infos = [_info(candidate, choice.backend) for candidate in (*chosen, *own)]
        sizes = [info.in_features for info in infos[: len(linear)]]
        # Each convolution makes patches of its own of what it gets.
        alone = [(i,) for i in range(len(linear), len(chosen))]
        groups = [*sibling_groups(linear, sizes), *alone]
        self._blocks = [*groups, *((i,) for i in range(len(chosen), len(infos)))]
        order, places = _order(built), _places(built)
        adapted = [n for n in order if n.endswith(tuple(targets)) and (_block(n)[1] or 0) >= first_block]
        trained = [n for n in places if n.endswith(tuple(targets))] if targets and not adapted else []
        if first_block and not adapted:
            raise ConfigError(f"there is no layer for adapters in transformer block {first_block} or above it")
        first = order[adapted[0]] if adapted else (places[trained[0]] if trained else len(places), -1)
        prefix, number = _block(adapted[0]) if adapted else ("", None)
        start = (0, -1) if number is None else min(i for n, i in order.items() if n.startswith(prefix))
        # Nothing is asked for the gradient of an input that comes before the first adapter.
        self._ahead = {i for group in groups if order[infos[min(group)].name] <= first for i in group}
        self._below = {i for i, info in enumerate(infos[: len(chosen)]) if order[info.name] < start}
        self._refused: dict[str, str] = {}
        self._groups: list[tuple[int, ...]] = []
        shared = sibling_groups(linear, sizes, share=options.share_inputs, experts=options.experts)
        for group in sorted([*shared, *alone], key=lambda group: order[infos[group[0]].name] if alone else 0):
            why = _refusal([infos[i] for i in group], choice.backend)
            if why is None:
                self._groups.append(group)
            else:
                self._refused[" + ".join(infos[i].name for i in group)] = why
        self._row = None if table is None else len(chosen) if table.tied is None else table.tied
        if self._row is not None and (why := choice.backend.refuse(lookup_map(infos[self._row]))) is not None:
            self._refused[f"{infos[self._row].name} (lookup)"] = why
            table = self._row = None
        self._table = table
        self._routed = _routed_share(built) if options.experts == "routed" else 1.0
        self._rows = patches.rows(built, [c.place for c in chosen], [c.place for c in patched])

    def placed(self, placement: Placement) -> PlannedModel:
        """The products with the workers that evaluate them."""
        placed = _Placed(self._infos, self._blocks, placement)
        tied = self._table is not None and self._table.tied is not None
        lookups = [] if self._row is None else [placed.lookup(self._row, tied=tied)]
        lookups = [dataclasses.replace(each, below=bool(self._below)) for each in lookups]

        def planned(of: Sequence[tuple[int, ...]]) -> list[PlannedGroup]:
            own = [
                placed.planned(group, group[0] not in self._ahead, self._chosen[group[0]], self._routed) for group in of
            ]
            own = [
                dataclasses.replace(
                    each, below=group[0] in self._below, rows=self._rows.get(self._chosen[group[0]].place, 1.0)
                )
                for each, group in zip(own, of, strict=True)
            ]
            return [*lookups, *own]

        apart = [(i,) for group in self._groups for i in group if self._chosen[i].part is None]
        together = [group for group in self._groups if self._chosen[group[0]].part is not None]

        return PlannedModel(
            model=self._model,
            choice=self._choice,
            chosen=[self._chosen[i] for group in self._groups for i in group],
            table=self._table,
            groups=planned(self._groups),
            singles=planned(sorted([*apart, *together])),
            refused=self._refused,
            worker_bytes=max(placed.weights) * (self._choice.backend.weight_bits or 32) // 8,
            named={info.name for info in self._infos},
        )


class _Placed:
    """A model placed on workers, as ``ciphertune.split`` does it."""

    def __init__(self, infos: Sequence[LayerInfo], groups: Sequence[tuple[int, ...]], placement: Placement) -> None:
        self._infos = infos
        self._placement = placement
        self._group_of = {i: group for group in groups for i in group}
        self._places: dict[tuple[int, ...], float] = {}
        self.weights = [0] * placement.workers
        total = sum(info.in_features * info.out_features for info in infos)
        done = 0.0
        for group in groups:
            size = sum(infos[i].in_features * infos[i].out_features for i in group)
            self._places[group] = (done + size / 2) / total
            done += size
            for worker in range(placement.workers):
                for info in (infos[i] for i in group):
                    start, stop = self._rows(info, worker, self._places[group])
                    self.weights[worker] += (stop - start) * info.in_features
        # Groups of the same sizes are cut alike.
        self._pieces = functools.lru_cache(None)(self._pieces_of)

    def planned(
        self, group: tuple[int, ...], backward: bool, first: Candidate | None = None, routed: float = 1.0
    ) -> PlannedGroup:
        """Layers of a group, or one of them alone.

        Args:
            group: the layers.
            backward: whether a gradient of its input is asked for.
            first: the first of them.
            routed: share of the tokens that routing sends to an expert; 1 where every token goes to every expert.
        """
        members = tuple(self._infos[i] for i in group)
        name = group_name([info.name for info in members])
        siblings = self._group_of[group[0]]
        sizes = tuple((self._infos[i].in_features, self._infos[i].out_features) for i in siblings)
        part = int(self._places[siblings] * self._placement.layers)
        pieces = self._pieces(sizes, tuple(siblings.index(i) for i in group), part)
        forward, whole_backward = (group_map(members, direction) for direction in DIRECTIONS)
        found = PlannedGroup(name, forward, whole_backward, pieces, backward)
        if first is None or first.part is None or first.part.layout is None:
            return found
        layout = first.part.layout
        routed = 1.0 if layout.apart else routed
        at_once = tokens_at_once(layout.widest) if routed == 1.0 and not layout.apart else None
        transposed = first.part.side == "outputs"
        return dataclasses.replace(found, transposed=transposed, at_once=at_once, share=routed)

    def lookup(self, row: int, tied: bool) -> PlannedGroup:
        """Lookups in the table that stands at this place."""
        held = self.planned((row,), backward=False)
        return dataclasses.replace(
            held,
            layers=f"{held.layers} (lookup)",
            whole_backward=lookup_map(self._infos[row]),
            lookup=True,
            tied=tied,
        )

    def _rows(self, info: LayerInfo, worker: int, place: float) -> tuple[int, int]:
        return self._placement.rows_of(worker, info.out_features, place)

    def _pieces_of(self, sizes: tuple[tuple[int, int], ...], members: tuple[int, ...], part: int) -> tuple[Piece, ...]:
        """Cut members of a group with these sizes, which is in this part of the layers."""
        infos = [LayerInfo(str(i), k, n, None, None, 1.0, 1.0, b"") for i, (k, n) in enumerate(sizes)]
        holdings: dict[int, list[list[Shard]]] = {}
        for worker in range(self._placement.workers):
            rows = [self._rows(info, worker, (part + 0.5) / self._placement.layers) for info in infos]
            block = [info.shard(*part) for info, part in zip(infos, rows, strict=True) if part[0] < part[1]]
            if block:
                holdings[worker] = [block]
        return place([[infos[i] for i in members]], holdings, {w: str(w) for w in holdings})[0]


def _order(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Places of the layers in a model, by name and in order: of linear ones, parts of experts, and convolutions."""
    places = _places(model)
    found = [*linear_layers(model, allow_meta=True), *convolutions(model, allow_meta=True)]
    ordered = sorted(found, key=lambda each: places[each.place])
    return {each.name: (places[each.place], i) for i, each in enumerate(ordered)}


def _places(model: nn.Module) -> dict[str, int]:
    return {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}


def _block(name: str) -> tuple[str, int | None]:
    """The path of the transformer block that a layer is in, with a dot behind it, and its number.

    >>> _block("model.layers.22.mlp.up_proj"), _block("lm_head")
    (('model.layers.22.', 22), ('', None))
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ("", None) if at is None else (".".join(parts[: at + 1]) + ".", int(parts[at]))


def kept_parameters(planned: PlannedModel) -> list[nn.Parameter]:
    """Parameters that stay at the client."""
    return parameters_without(
        planned.model, [*planned.chosen, *(() if planned.table is None else planned.table.places)]
    )


def parameters_without(model: nn.Module, outsourced: Sequence[Candidate]) -> list[nn.Parameter]:
    """Parameters that stay where these layers are outsourced: a tied weight goes once all its places do."""
    places = collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())
    places.subtract(id(p) for p in {candidate.tensor: candidate.parameter() for candidate in outsourced}.values())
    return [p for p in model.parameters() if places[id(p)] > 0]


def _routed_share(model: nn.Module) -> float:
    """Share of the tokens that an expert gets on average, as far as the configuration says it."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "ffn_config", None) or config
    used = next((getattr(config, name) for name in _USED if isinstance(getattr(config, name, None), int)), None)
    counts = [layout.experts for layout in map(layout_of, model.modules()) if layout is not None]
    return min(1.0, used / counts[0]) if used and counts else 1.0


def _info(candidate: Candidate, backend: Backend) -> LayerInfo:
    """Sizes and weight format; a plan reads no weight."""
    rows, columns = candidate.weight().shape
    # Norms are those of Gaussian weights, whose largest of a row is about three and a half deviations away.
    top = 127 / 3.5
    norms = top * math.sqrt(columns), top * math.sqrt(rows)
    return LayerInfo(candidate.name, columns, rows, backend.weight_bits, None, *norms, b"")


def _refusal(members: Sequence[LayerInfo], backend: Backend) -> str | None:
    """Why a backend cannot evaluate a group, in either direction."""
    answers = (backend.refuse(group_map(members, direction)) for direction in DIRECTIONS)
    return next((why for why in answers if why is not None), None)
