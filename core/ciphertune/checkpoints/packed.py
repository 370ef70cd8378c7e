"""A tensor that a checkpoint stores in fewer bits, and the arithmetic that formats share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ciphertune.checkpoints.files import Header
from ciphertune.errors import ConfigError

Read = Callable[[str], Tensor]
"""Gives a tensor of the checkpoint by its name there."""

_AT_ONCE = 1 << 22
"""Values unpacked at once, so that a large layer takes little memory beside its result."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """How one tensor is made of others.

    Attributes:
        parts: names of the stored tensors that it is made of, and of those that say nothing of its values.
        unpack: gives the tensor, in float32 or another dtype that holds it exactly.
        codes: gives (N, K) int8 codes and (N,) float32 scales of which it is the product, where it is stored so.
    """

    parts: tuple[str, ...]
    unpack: Callable[[Read], Tensor]
    codes: Callable[[Read], tuple[Tensor, Tensor] | None] | None = None


class Format(Protocol):
    """Finds the packed tensors of a checkpoint, by headers alone."""

    def __call__(self, headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
        """Name of each packed tensor once it is unpacked → how that is done.

        Args:
            headers: of the checkpoint's tensors.
            settings: ``quantization_config`` of the model.

        Raises:
            ConfigError: the settings, or a tensor's shape or dtype, are of no kind that is known; it names the tensor.
        """
        ...


def fail(name: str, what: str) -> ConfigError:
    """The error for a tensor that cannot be unpacked."""
    return ConfigError(
        f"the tensor {name!r} cannot be unpacked: {what}. Take the model in bf16 or fp16, or unpack it with the tool "
        "that packed it"
    )


def words(tensor: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits out of int32 words, (R, W) → (R, W · 32 / bits) uint8.

    A row's words are one string of bits, the lowest first. Where 32 is no multiple of ``bits``, W is one of it.
    """
    octets = tensor.contiguous().view(torch.uint8)
    step = bits if 8 % bits == 0 else 1
    mask = (1 << step) - 1
    parts = (octets.unsqueeze(-1) >> torch.arange(0, 8, step, dtype=torch.uint8)) & mask
    if step == bits:
        return parts.flatten(-2)
    weights = 1 << torch.arange(bits, dtype=torch.uint8)
    return (parts.reshape(*tensor.shape[:-1], -1, bits) * weights).sum(-1, dtype=torch.uint8)


def grouped(values: Tensor, scale: Tensor, zeros: Tensor | None, group: Tensor | None) -> Tensor:
    """``(values - zeros) · scale`` in float32, with scales by row and group of columns.

    Args:
        values: (N, K), integers.
        scale: (N, G) or (1, G), floating.
        zeros: (N, G), integers; None for zeros.
        group: (K,) int64, the group of each column; None where there is one group.
    """
    out = torch.empty(values.shape, dtype=torch.float32)
    for rows in chunks(*values.shape):
        part = values[rows].to(torch.float32)
        by_row = scale if len(scale) == 1 else scale[rows]
        if zeros is not None:
            part -= _spread(zeros[rows].to(torch.float32), group)
        part *= _spread(by_row.to(torch.float32), group)
        out[rows] = part
    return out


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix in parts of about as many values as are worked on at once."""
    step = max(1, _AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def groups_of(columns: int, size: int) -> Tensor:
    """(columns,) int64: the group of each column, in groups of ``size``."""
    return torch.arange(columns) // size


def checked_groups(index: Tensor, columns: int, count: int, name: str) -> Tensor:
    """A stored table of the group of each column, (columns,). Raises ``ConfigError`` where it does not fit."""
    if tuple(index.shape) != (columns,) or int(index.min()) < 0 or int(index.max()) >= count:
        raise fail(name, f"it does not name one of {count} groups for each of {columns} columns")
    return index.to(torch.int64)


def _spread(by_group: Tensor, group: Tensor | None) -> Tensor:
    return by_group if group is None else by_group[:, group]
