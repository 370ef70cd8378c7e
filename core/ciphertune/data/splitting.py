"""A held-out part of the data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

ItemT = TypeVar("ItemT")


def split(items: Sequence[ItemT], share: float) -> tuple[list[ItemT], list[ItemT]]:
    """Items to train on and a held-out part, evenly spread over them; order is kept.

    Args:
        items: two or more.
        share: of the items to hold out, above 0 and below 1; at least one is held out and one is not.

    >>> split("abcdefgh", 0.4)
    (['b', 'd', 'e', 'g', 'h'], ['a', 'c', 'f'])
    """
    count = min(max(1, round(len(items) * share)), len(items) - 1)
    held = set(_spread(range(len(items)), count))
    return _parted(items, held)


def split_by(items: Sequence[ItemT], kinds: Sequence[Hashable], share: float) -> tuple[list[ItemT], list[ItemT]]:
    """The same for items of several kinds: of every kind the same share, and at least one to train on.

    Args:
        items: in any order.
        kinds: of each item.
        share: from 0, for nothing, to below 1.

    >>> split_by("abcdefgh", [1, 1, 1, 1, 2, 2, 2, 3], 0.34)
    (['b', 'c', 'd', 'f', 'g', 'h'], ['a', 'e'])
    """
    groups: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(number)
    counts = {kind: min(round(len(group) * share), len(group) - 1) for kind, group in groups.items()}
    largest = max(groups, key=lambda kind: len(groups[kind]))
    if share > 0 and not any(counts.values()) and len(groups[largest]) > 1:
        counts[largest] = 1
    return _parted(items, {place for kind, group in groups.items() for place in _spread(group, counts[kind])})


def _spread(places: Sequence[int], count: int) -> list[int]:
    return [places[number * len(places) // count] for number in range(count)]


def _parted(items: Sequence[ItemT], held: set[int]) -> tuple[list[ItemT], list[ItemT]]:
    return [item for i, item in enumerate(items) if i not in held], [items[i] for i in sorted(held)]
