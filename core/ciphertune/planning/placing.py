"""Comparison of placements of a model on workers, by the seconds that each would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ciphertune.bundle.placement import Placement, placements
from ciphertune.errors import ConfigError
from ciphertune.planning.estimate import Estimate
from ciphertune.planning.products import PlannedModel, Products

NEAR = 1.01
"""Placements whose seconds are this close are alike, and the one that needs less memory is better."""

Estimates = Callable[[PlannedModel, Placement, int], Estimate]
"""Seconds of a placement, with a number of micro-batches under way at once."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A placement that was compared.

    Attributes:
        workers: how many.
        placement: as ``ciphertune.bundle.placement.Placement.read`` takes it.
        interleave: micro-batches under way at once.
        seconds: of a step, or of a pass of generation.
        bottleneck: what most of it waits for, as of ``Estimate.bottleneck``.
        worker_bytes: of the weights that the fullest worker holds.
    """

    workers: int
    placement: str
    interleave: int
    seconds: float
    bottleneck: str
    worker_bytes: int


def candidates(
    products: Products, workers: int, placement: Placement | str | None, memory: float | None
) -> list[tuple[Placement, PlannedModel]]:
    """The placement that was asked for, or all that fit where None was; with their products.

    Raises:
        ConfigError: it cannot be read, is of another number of workers, or nothing fits.
    """
    if placement is None:
        return fitting(products, workers, memory)
    placed = Placement.read(str(placement), workers)
    return [(placed, products.placed(placed))]


def to_measure(whole: PlannedModel, placed: PlannedModel) -> PlannedModel:
    """Products as one worker has them, and as those have them that divide a layer."""
    return dataclasses.replace(whole, groups=[*whole.groups, *placed.groups])


def fitting(products: Products, workers: int, memory: float | None) -> list[tuple[Placement, PlannedModel]]:
    """Placements on a number of workers in whose memory the weights fit, with their products; fewest parts first.

    Raises:
        ConfigError: there is none.
    """
    fit = fits(products, workers, memory)
    if not fit:
        least = min(products.placed(placement).worker_bytes for placement in placements(workers))
        raise ConfigError(
            f"the weights do not fit: {workers} workers would hold {least / 1e9:.3g} GB each at least, and "
            f"{(memory or 0) / 1e9:.3g} GB are what one may have: use more workers"
        )
    return fit


def fits(products: Products, workers: int, memory: float | None) -> list[tuple[Placement, PlannedModel]]:
    """As ``fitting``, and nothing where no placement fits."""
    found = [(placement, products.placed(placement)) for placement in placements(workers)]
    fit = [each for each in found if memory is None or each[1].worker_bytes <= memory]
    return sorted(fit, key=lambda each: each[0].layers)


def compare(
    fit: Sequence[tuple[Placement, PlannedModel]], estimates: Estimates, interleaves: Sequence[int]
) -> list[Tried]:
    """Compare placements, the best first.

    Args:
        fit: as ``fitting`` gives them.
        estimates: seconds of each.
        interleaves: numbers of micro-batches at once to try.
    """
    found = []
    for placement, planned in fit:
        for interleave in interleaves:
            estimate = estimates(planned, placement, interleave)
            found.append(
                Tried(
                    placement.workers,
                    str(placement),
                    interleave,
                    estimate.total,
                    estimate.bottleneck,
                    planned.worker_bytes,
                )
            )
    fastest = min(each.seconds for each in found)
    near = [each for each in found if each.seconds <= NEAR * fastest]
    best = min(near, key=lambda each: (each.worker_bytes, each.interleave, each.seconds))
    return [best, *sorted((each for each in found if each is not best), key=lambda each: each.seconds)]
