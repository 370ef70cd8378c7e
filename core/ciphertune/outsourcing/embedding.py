"""Token embeddings whose table is at the workers: which they are, and the module that looks rows up there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.absent_tensor import AbsentTensor, WithoutWeight
from ciphertune._support.torch_compat import uncompiled, without_autocast
from ciphertune.callers import Owners, owners_of
from ciphertune.errors import InputError, NothingOutsourcedError, UnsupportedLayerError
from ciphertune.outsourcing.group import LayerGroup
from ciphertune.outsourcing.layers import Candidate, linear_layers, meant_to_train
from ciphertune.outsourcing.obstacles import weight_obstacle
from ciphertune.outsourcing.walk import bare_name, walk
from ciphertune.weights import LayerInfo

_VALUES_AT_ONCE = 1 << 26
_TOKENS_STEP = 256


def tokens_at_once(features: int) -> int:
    """Tokens of one request at most, of products with so many features on one side: their values take 256 MB of memory.

    >>> tokens_at_once(49152)
    1280
    """
    return max(1, _VALUES_AT_ONCE // features // _TOKENS_STEP) * _TOKENS_STEP


@dataclasses.dataclass(frozen=True)
class Table:
    """A model's token embeddings, all of one weight.

    Attributes:
        places: the embeddings; encoder and decoder may each have one.
        tied: index, among the layers that are outsourced, of the linear layer with the same weight; None without one.
    """

    places: tuple[Candidate, ...]
    tied: int | None


def choose_table(
    model: nn.Module, chosen: Sequence[Candidate], *, allow_meta: bool = False
) -> tuple[list[Candidate], Table]:
    """Find a model's token embeddings, and the layers to outsource with them.

    Args:
        model: has ``get_input_embeddings``, as every transformers model.
        chosen: the layers that are outsourced anyway.
        allow_meta: take embeddings without weights, on the meta device, as well.

    Returns:
        ``chosen``, and the output head where it is the same table, in module order; and the table.

    Raises:
        NothingOutsourcedError: the model names no token embedding, or it is at the workers already.
        UnsupportedLayerError: it cannot be outsourced, or what it is tied to cannot.
    """
    weight = _table_weight(model)
    mixed = meant_to_train(model)
    places = [
        Candidate(bare_name(model, path), parent, attribute, module, _obstacle(module, mixed, allow_meta), None)
        for path, parent, attribute, module in walk(model)
        if isinstance(module, nn.Embedding) and module._parameters.get("weight") is weight
    ]
    linear = linear_layers(model, allow_meta=allow_meta, trial=False)
    tied = [candidate for candidate in linear if candidate.module._parameters.get("weight") is weight]
    for candidate in (*places, *tied):
        if candidate.obstacle is not None:
            raise UnsupportedLayerError(f"{candidate.name} cannot be outsourced: {candidate.obstacle}")
    if not places:
        raise UnsupportedLayerError(
            "the token embedding cannot be outsourced: it is no nn.Embedding, or is trained whole (modules_to_save)"
        )
    names = {candidate.name for candidate in (*chosen, *tied)}
    together = [candidate for candidate in linear if candidate.name in names]
    index = next((i for i, each in enumerate(together) if each.module._parameters.get("weight") is weight), None)
    return together, Table(tuple(places), index)


class OutsourcedEmbedding(WithoutWeight, nn.Embedding):
    """A token embedding whose table is at the workers. It is frozen: there is no gradient of a lookup.

    Args:
        info: what is known of the table, as of a layer with a row for each token.
        group: looks rows up in the table.
        padding_idx: as in ``nn.Embedding``.
        like: a tensor whose device and dtype the embedding reports as its weight's, and gives its output.
        tied: whether the weight was tied to another module's.
    """

    weight: Any
    original: Any = None

    def __init__(
        self, info: LayerInfo, group: LayerGroup, padding_idx: int | None, like: Tensor, *, tied: bool
    ) -> None:
        nn.Module.__init__(self)
        self.info = info
        self.name = info.name
        self.keep_parameters()
        self.group = group
        self.num_embeddings, self.embedding_dim = info.out_features, info.in_features
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        full = torch.Size((info.out_features, info.in_features))
        self.register_buffer("weight", AbsentTensor.make(info.name, full, like), persistent=False)
        self.tied = tied

    @uncompiled
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Embedding uses
        """Rows of the table, (…, embedding_dim), for ids of any shape (…).

        Every id is sent as a row of its own, equal ones too: how many differ is data.

        Raises:
            InputError: the input is not of integers, or an id is outside of the table.
            OutsourcedWeightError: the call is traced by ``torch.jit`` or ``torch.fx``, or is to look up in another
                table.
        """
        ids = input
        self.refuse_tracing(ids)
        self.refuse_other_weight()
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"{self.name}: expected token ids of int64 or int32, got {ids.dtype}")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.num_embeddings):
            raise InputError(f"{self.name}: a token id is outside of the table of {self.num_embeddings} rows")
        owners = owners_of((*ids.shape, self.embedding_dim))
        flat = ids.detach().reshape(-1, 1).long()
        most = tokens_at_once(self.num_embeddings)
        with torch.no_grad(), without_autocast(ids.device.type):
            parts = [
                self._rows(flat[start : start + most], None if owners is None else _part(owners, start, start + most))
                for start in range(0, len(flat), most)
            ]
            rows = torch.cat(parts) if parts else torch.empty(0, self.embedding_dim, device=ids.device)
            return rows.to(self.weight.dtype).reshape(*ids.shape, self.embedding_dim)

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the table at the workers."""
        return weight.dim() == 2 and self.info.describes(weight)

    def _rows(self, ids: Tensor, owners: Owners | None) -> Tensor:
        """``one-hot · diag(scale) · codes``, the scale of a row in the place of the one."""
        scale = self.info.scale
        values = torch.ones(ids.shape, device=ids.device) if scale is None else scale.to(ids.device)[ids]
        named = torch.zeros(len(ids), self.num_embeddings, dtype=torch.float32, device=ids.device)
        return self.group.lookup(named.scatter_(1, ids, values), owners)

    def extra_repr(self) -> str:
        """Sizes and where the table is."""
        return f"{self.num_embeddings}, {self.embedding_dim}, to={self.group.to!r}"


def outsourced_embeddings(model: nn.Module) -> list[OutsourcedEmbedding]:
    """The outsourced token embeddings of a model."""
    return [module for module in model.modules() if isinstance(module, OutsourcedEmbedding)]


def _part(owners: Owners, start: int, stop: int) -> Owners:
    """Whose the tokens from start to stop are."""
    found = []
    first = 0
    for caller, count in owners:
        if (held := min(stop, first + count) - max(start, first)) > 0:
            found.append((caller, held))
        first += count
    return tuple(found)


def _table_weight(model: nn.Module) -> Tensor:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except NotImplementedError:  # transformers' way to say that there are none
        found = None
    if isinstance(found, OutsourcedEmbedding):
        raise NothingOutsourcedError(f"the token embedding {found.name!r} is at the workers already")
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise NothingOutsourcedError(
            f"{type(model).__name__} names no token embedding that could be outsourced (get_input_embeddings)"
        )
    return weight


def _obstacle(module: nn.Embedding, mixed: bool, allow_meta: bool) -> str | None:
    """Why an embedding cannot be outsourced, None if it can."""
    weight: Any = module._parameters["weight"]
    if type(module).forward is not nn.Embedding.forward or "forward" in vars(module):
        return f"{type(module).__name__} is an embedding with a behaviour of its own"
    if module.max_norm is not None:
        return "it renormalises its rows (max_norm)"
    return weight_obstacle(weight, mixed, allow_meta)
