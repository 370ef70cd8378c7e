"""Shares of models that are at the workers, by what is outsourced. No weight is loaded."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

from torch import nn

from ciphertune.errors import LayerError, NothingOutsourcedError
from ciphertune.models.known import skeleton
from ciphertune.outsourcing.embedding import choose_table
from ciphertune.outsourcing.layers import Candidate, choose_layers
from ciphertune.planning.products import parameters_without
from ciphertune.plugins.manager import plugin_manager


@dataclasses.dataclass(frozen=True)
class ModelShares:
    """Outsourced weights over all, 0 to 1.

    Attributes:
        weights: of the model.
        default: of the layers that are outsourced unless others are named.
        with_head: of every layer that can be outsourced, the output head among them. Where that is tied to the
            embedding, the client keeps the embedding's copy, which counts among all.
        with_embeddings: of these and the token embedding; None for a model whose embedding cannot be outsourced.
    """

    weights: int
    default: float
    with_head: float
    with_embeddings: float | None

    @property
    def largest(self) -> float:
        """The largest of them."""
        return max(self.default, self.with_head, self.with_embeddings or 0.0)


def shares_of(model: str | nn.Module) -> ModelShares:
    """Count the shares of a model.

    Args:
        model: as of ``ciphertune.planning.plan.make_plan``, or a module, whose weights may be on the meta device.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    built = skeleton(model) if isinstance(model, str) else model
    every = _chosen(built, "all")
    try:
        together, table = choose_table(built, every, allow_meta=True)
        with_embeddings = _fraction(built, [*together, *table.places])
    except LayerError:
        with_embeddings = None
    return ModelShares(
        weights=sum(p.numel() for p in built.parameters()),
        default=_fraction(built, _chosen(built, None)),
        with_head=_fraction(built, every),
        with_embeddings=with_embeddings,
    )


def _chosen(model: nn.Module, layers: str | None) -> list[Candidate]:
    try:
        with warnings.catch_warnings():
            # Of layers that stay: whoever outsources the model is told.
            warnings.simplefilter("ignore")
            return choose_layers(model, layers, plugin_manager(), allow_meta=True)
    except NothingOutsourcedError:
        return []


def _fraction(model: nn.Module, outsourced: Sequence[Candidate]) -> float:
    weights = {(id(candidate.parameter()), candidate.part): candidate.weight().numel() for candidate in outsourced}
    away = sum(weights.values())
    return away / (away + sum(p.numel() for p in parameters_without(model, outsourced)))
