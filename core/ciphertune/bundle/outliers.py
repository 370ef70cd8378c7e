"""Channels that the client keeps, as tables of its part of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciphertune.checkpoints.files import read_tensor
from ciphertune.errors import ConfigError
from ciphertune.weights import MOST_CHANNELS, KeptChannels, LayerInfo, LayerWeight

_INPUTS = ("inputs", "columns", "column_scales")
_OUTPUTS = ("outputs", "rows", "row_scales")


def kept_tables(layer: LayerInfo) -> dict[str, Tensor]:
    """The tables of a layer: channel numbers, their weights in 16 bits and the scales of these."""
    kept = layer.kept
    if kept is None:
        return {}
    tables: dict[str, Tensor] = {}
    for names, channels, weight in ((_INPUTS, kept.inputs, kept.columns), (_OUTPUTS, kept.outputs, kept.rows)):
        assert weight.scale is not None
        for name, values in zip(names, (channels, weight.codes, weight.scale), strict=True):
            tables[f"{layer.name}.kept.{name}"] = values.cpu().contiguous().clone()
    return tables


def read_kept(handle: Any, file: Path, layer: LayerInfo) -> LayerInfo:
    """A layer with what its tables say.

    Args:
        handle: of ``file``, open.
        file: the client's tables.
        layer: without.

    Raises:
        ConfigError: tables are missing, or do not fit the layer.
    """

    def read(names: tuple[str, str, str], features: int, values: int) -> tuple[Tensor, LayerWeight]:
        channels, codes, scale = (read_tensor(handle, file, f"{layer.name}.kept.{name}") for name in names)
        count = len(channels) if channels.dim() == 1 else -1
        fits = (
            channels.dtype == torch.int64
            and 0 <= count <= MOST_CHANNELS
            and codes.dtype == torch.int16
            and codes.shape == (count, values)
            and scale.dtype == torch.float32
            and scale.shape == (count,)
        )
        if not fits or not _rising(channels, features) or not bool((scale.isfinite() & (scale >= 0)).all()):
            raise ConfigError(f"{file} is damaged: the channels kept of {layer.name!r} do not fit the layer")
        return channels.clone(), LayerWeight(codes.clone(), scale.clone())

    inputs, columns = read(_INPUTS, layer.in_features, layer.out_features)
    outputs, rows = read(_OUTPUTS, layer.out_features, layer.in_features)
    return dataclasses.replace(layer, kept=KeptChannels(inputs, columns, outputs, rows))


def check_kept(groups: Sequence[Sequence[LayerInfo]], file: Path) -> None:
    """Hold the layers of each group against each other: one list of inputs, and not too many outputs.

    Raises:
        ConfigError: they do not fit.
    """
    for group in groups:
        inputs = [[] if layer.kept is None else layer.kept.inputs.tolist() for layer in group]
        outputs = sum(0 if layer.kept is None else len(layer.kept.outputs) for layer in group)
        if any(each != inputs[0] for each in inputs) or outputs > MOST_CHANNELS:
            names = " and ".join(repr(layer.name) for layer in group)
            raise ConfigError(f"{file} is damaged: the channels kept of {names} do not fit each other")


def _rising(channels: Tensor, features: int) -> bool:
    """Whether channel numbers are those of features, each once and in order."""
    numbers: list[int] = channels.tolist()
    return all(0 <= number < features for number in numbers) and numbers == sorted(set(numbers))
