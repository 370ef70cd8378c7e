"""Whose a batch's rows are, where several callers use one model: no secret of an encryption masks values of two."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Sequence

from ciphertune.errors import SecurityError

Owners = tuple[tuple[str, int], ...]
"""Callers and their numbers of tokens, in the order of a product's tokens."""

_ROWS: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("ciphertune_callers", default=None)


@contextlib.contextmanager
def batch_of(callers: Sequence[str]) -> Iterator[None]:
    """Say whose the rows of every batch are that a model computes within a ``with`` block, on this thread.

    Args:
        callers: of each row, by any name that no two callers share.
    """
    if not callers:
        raise ValueError("a batch has at least one row")
    token = _ROWS.set(tuple(callers))
    try:
        yield
    finally:
        _ROWS.reset(token)


def has_several() -> bool:
    """Whether rows of several callers are computed together on this thread."""
    rows = _ROWS.get()
    return rows is not None and len(set(rows)) > 1


def owners_of(shape: Sequence[int]) -> Owners | None:
    """Whose the tokens are of a layer's input; None where nobody said.

    Args:
        shape: (batch, …, features), or (…, features) where all rows are of one caller.

    Raises:
        SecurityError: rows are of several callers, and the shape does not tell which token is of which row.
    """
    rows = _ROWS.get()
    if rows is None:
        return None
    tokens = math.prod(shape[:-1])
    if len(set(rows)) == 1:
        return ((rows[0], tokens),)
    if len(shape) < 3 or shape[0] != len(rows):
        raise SecurityError(
            f"an input of shape {tuple(shape)} does not tell which of its tokens is of which of the {len(rows)} rows "
            "of a batch of several callers; nothing was sent"
        )
    each = tokens // len(rows)
    return tuple((caller, each * len(list(group))) for caller, group in itertools.groupby(rows))
