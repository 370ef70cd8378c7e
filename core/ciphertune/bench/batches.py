"""Batches in micro-batches of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ciphertune.errors import ConfigError


def cut_batch(batch: Any, count: int) -> list[Any]:
    """Cut a batch into equal parts, along its first dimension.

    Args:
        batch: tensors with as many rows each: by name, or one after the other.
        count: of parts.

    Raises:
        ConfigError: the rows cannot be divided by ``count``.
    """
    names = list(batch) if isinstance(batch, Mapping) else None
    tensors = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    rows = len(tensors[0])
    if rows % count:
        raise ConfigError(f"a step of {rows} sequences or samples cannot be cut into {count} micro-batches of one size")
    parts = zip(*(tensor.split(rows // count) for tensor in tensors), strict=True)
    return [part if names is None else dict(zip(names, part, strict=True)) for part in parts]
