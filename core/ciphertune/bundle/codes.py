"""Codes read from workers' folders."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ciphertune._support.bundle_names import WORKER_MANIFEST
from ciphertune.bundle.worker import load_worker
from ciphertune.errors import ConfigError, WeightsError
from ciphertune.weights import LayerInfo


class FolderCodes:
    """``CodeSource`` of a worker's folder, or of a folder with those of several workers. It is not trusted.

    Args:
        folder: written by ``split``: ``worker``, or what ``worker-0``, ``worker-1`` … lie in.

    Raises:
        ConfigError: there is no worker's folder, or one is damaged.
    """

    lasting = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        place = Path(folder)
        self._folder = place
        found = [place] if (place / WORKER_MANIFEST).is_file() else sorted(place.glob(f"*/{WORKER_MANIFEST}"))
        if not found:
            raise ConfigError(
                f"{place} holds no weights: name a worker's folder that 'ciphertune split' wrote, or the folder that "
                "several of them lie in"
            )
        # The client holds every block against its own hashes.
        self._stores = [load_worker(each if each == place else each.parent, verify=False) for each in found]

    def read(self, layer: LayerInfo, start: int, stop: int) -> Tensor:
        """See ``CodeSource.read``. Raises ``WeightsError`` where the folder lacks them."""
        parts: list[Tensor] = []
        row = start
        while row < stop:
            for store in self._stores:
                shard = store.shard(layer.name) if layer.name in store else None
                if shard is not None and shard.start <= row < shard.stop:
                    end = min(stop, shard.stop)
                    parts.append(store.rows(layer.name, row, end))
                    row = end
                    break
            else:
                raise WeightsError(f"{self._folder} lacks row {row} of {layer.name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def distrust(self, layer: LayerInfo, start: int, stop: int) -> bool:
        """See ``CodeSource.distrust``: a folder is read once."""
        return False
