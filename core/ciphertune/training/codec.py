"""Encoding of nested plain values and tensors as JSON plus named tensors, without pickle."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
from torch import Tensor

from ciphertune.errors import CheckpointError

_TAGS = frozenset({"tensor", "tuple", "dict", "counter", "float"})


def encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """Encode a value as JSON can hold it; tensors are added to ``tensors`` under names that end with ``place``.

    A value that JSON lacks becomes a one-entry object ``{"$tag": …}``.

    Raises:
        CheckpointError: something in ``value`` is neither a plain value nor a tensor.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{place}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors, f"{place}/{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        counter = isinstance(value, collections.Counter)
        if not counter and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item, tensors, f"{place}/{key}") for key, item in value.items()}
        tag = "$counter" if counter else "$dict"
        return {
            tag: [
                [encode(key, tensors, f"{place}/key{i}"), encode(item, tensors, f"{place}/{i}")]
                for i, (key, item) in enumerate(value.items())
            ]
        }
    raise CheckpointError(
        f"{place} holds a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot store: it "
        "takes numbers, text, lists, dicts and tensors, never pickled objects. Use an optimizer or scheduler whose "
        "state_dict() is made of these, or train without checkpoint_dir"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Decode what ``encode`` returned.

    Raises:
        KeyError, TypeError, ValueError: it did not come from ``encode`` or a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: decode(item, tensors) for key, item in value.items()}
    if len(value) != 1 or tags[0][1:] not in _TAGS:
        raise ValueError(f"unknown tag {tags[0]!r}")
    ((tag, content),) = value.items()
    if tag == "$tensor":
        return tensors[content]
    if tag == "$float":
        return float(content)
    if tag == "$tuple":
        return tuple(decode(content, tensors))
    pairs = {decode(key, tensors): decode(item, tensors) for key, item in content}
    return collections.Counter(pairs) if tag == "$counter" else pairs
