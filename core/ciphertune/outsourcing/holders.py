"""Who computes with a session: the handles of a model's layers, and those of its copies."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

_HOLDERS: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def hold(session: object, holder: object) -> None:
    """Note that something computes with a session, for as long as it lives."""
    _HOLDERS.setdefault(session, weakref.WeakSet()).add(holder)


def held_by_others(session: object, holders: Collection[object]) -> bool:
    """Whether anything but these computes with a session, as the layers of a model's copy do."""
    own = {id(holder) for holder in holders}
    return any(id(each) not in own for each in _HOLDERS.get(session, ()))
