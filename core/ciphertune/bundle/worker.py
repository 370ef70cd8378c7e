"""A worker's part of a bundle, memory-mapped."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciphertune._support.bundle_names import WORKER_MANIFEST
from ciphertune._support.suggestions import closest
from ciphertune.bundle.files import (
    WORKER_FORMAT,
    inside,
    open_tensors,
    read_manifest_file,
    read_tensor,
)
from ciphertune.bundle.placement import cut_rows
from ciphertune.errors import ConfigError, ProtocolError, UnknownLayerError
from ciphertune.weights import LayerInfo, LayerWeight, Shard, row_digests
from ciphertune.worker.store import WeightStore

_DTYPES = {8: torch.int8, 16: torch.int16, None: torch.float32}


def load_worker(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    layers: Iterable[str] | None = None,
    rows: tuple[int, int] = (0, 1),
    verify: bool = True,
) -> WeightStore:
    """The weights in a worker's folder. On the CPU they stay pages of the files, shared by all processes that map them.

    Args:
        folder: written by ``split``.
        device: where the weights are evaluated.
        layers: names, ends of names or ``*`` patterns of the layers to serve; all if None.
        rows: which part of each layer's rows to serve, from 0, and of how many.
        verify: read every weight and hold its hash against the manifest's.

    Raises:
        ConfigError: the folder is no worker's folder, or damaged.
        UnknownLayerError: a pattern matches nothing.
    """
    read = read_blocks(Path(folder))
    wanted = None if layers is None else _matching([s.name for _, shards in read for s in shards], list(layers))
    store = WeightStore()
    for file, shards in read:
        if wanted is None or any(shard.name in wanted for shard in shards):
            _load_block(store, file, shards, wanted, rows, torch.device(device), verify)
    return store


def read_blocks(folder: Path) -> list[tuple[Path, list[Shard]]]:
    """List what a worker's folder holds: each block's file, and the shards in it from the top. Reads no weight.

    Raises:
        ConfigError: the folder is no worker's folder, or its manifest is damaged.
    """
    blocks = read_manifest_file(folder / WORKER_MANIFEST, WORKER_FORMAT).get("blocks")
    if not isinstance(blocks, list):
        raise ConfigError(f"{folder / WORKER_MANIFEST} is damaged: it lists no blocks")
    return [_read_block(folder, block) for block in blocks]


def _read_block(folder: Path, block: Any) -> tuple[Path, list[Shard]]:
    try:
        shards = [Shard.read(row) for row in block["shards"]]
        file = inside(folder, block["file"])
    except (ProtocolError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / WORKER_MANIFEST} is damaged: {error}") from error
    if not shards:
        raise ConfigError(f"{folder / WORKER_MANIFEST} is damaged: a block holds no layer")
    return file, shards


def _load_block(
    store: WeightStore,
    file: Path,
    shards: list[Shard],
    wanted: set[str] | None,
    part: tuple[int, int],
    device: torch.device,
    verify: bool,
) -> None:
    handle = open_tensors(file)
    codes, scale = (read_tensor(handle, file, name) for name in ("codes", "scale"))
    rows = sum(shard.rows for shard in shards)
    expected = (rows, shards[0].in_features)
    if tuple(codes.shape) != expected or codes.dtype != _DTYPES[shards[0].weight_bits] or tuple(scale.shape) != (rows,):
        raise ConfigError(
            f"{file} is damaged: codes {codes.dtype} {tuple(codes.shape)} where {expected} were announced"
        )
    if verify:
        _verify(file, shards, codes, scale)
    try:
        for run, held in _served(shards, wanted, part, codes, scale):
            store.add(run, held.to(device))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


def _served(
    shards: list[Shard], wanted: set[str] | None, part: tuple[int, int], codes: Tensor, scale: Tensor
) -> list[tuple[list[Shard], Tensor]]:
    """Shards of a block that are served, with their codes. Neighbours stay one block, which is one product.

    Whole shards stay views of the file. Parts of several are copied into one block.
    """
    runs: list[tuple[list[Shard], list[Tensor]]] = []
    row, end = 0, -1
    for shard in shards:
        first, last = cut_rows(shard.out_features, *part)
        first, last = max(first, shard.start), min(last, shard.stop)
        if first < last and (wanted is None or shard.name in wanted):
            rows = slice(row + first - shard.start, row + last - shard.start)
            whole = (first, last) == (shard.start, shard.stop)
            if not runs or end != row:
                runs.append(([], []))
            runs[-1][0].append(shard if whole else _cut(shard, first, last, codes[rows], scale[rows]))
            runs[-1][1].append(codes[rows])
            end = row + shard.rows
        row += shard.rows
    return [(run, _stacked(parts)) for run, parts in runs]


def _stacked(parts: list[Tensor]) -> Tensor:
    """Rows below each other, without a copy where they are so in one tensor already."""
    first, rows, at = parts[0], 0, parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at:
            return torch.cat(parts)
        rows, at = rows + len(part), at + part.nbytes
    return first.as_strided((rows, first.shape[1]), first.stride())


def _cut(shard: Shard, first: int, last: int, codes: Tensor, scale: Tensor) -> Shard:
    """Rows first to last of a shard's layer, with these codes and scales, as a shard."""
    digests = row_digests(LayerWeight(codes, scale))
    return dataclasses.replace(shard, start=first, stop=last, digest=hashlib.sha256(digests).hexdigest())


def _verify(file: Path, shards: list[Shard], codes: Tensor, scale: Tensor) -> None:
    row = 0
    for shard in shards:
        part = slice(row, row + shard.rows)
        digests = row_digests(LayerWeight(codes[part], scale[part]))
        found = LayerInfo(
            shard.name, shard.in_features, shard.rows, shard.weight_bits, None, 0.0, 0.0, digests
        ).digest()
        if found != shard.digest:
            raise ConfigError(f"{file} is damaged: the weights of {shard.name!r} do not have the hash in the manifest")
        row += shard.rows


def _matching(names: list[str], patterns: list[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {n for n in names if n == pattern or n.endswith("." + pattern) or fnmatch.fnmatchcase(n, pattern)}
        if not matches:
            raise UnknownLayerError(f"no layer in the bundle matches {pattern!r}; {closest(pattern, names)}")
        chosen |= matches
    return chosen
