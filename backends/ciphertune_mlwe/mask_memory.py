"""Memory for masks: absent from core dumps, wiped in forks, and of no use once it was."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np
import torch
from torch import Tensor

from ciphertune.errors import SecurityError
from ciphertune_mlwe.prg import Bytes, Keystream, fresh_seed, room
from ciphertune_mlwe.spare_memory import SPARE

_TAG_BYTES = 64
_DRAWN_BYTES = 1 << 18


class MaskMemory:
    """One matrix of int32, with a random tag in the same mapping.

    A fork finds zeros here (``MADV_WIPEONFORK``), and a mask of zeros would send the plaintext: so the tag, which is
    never zero, is compared before a mask is used, beside the process.

    Args:
        rows, columns: of the matrix.
        by_columns: whether values of a column stand side by side, and not those of a row.
        device: where it lives; memory of other devices is mapped in no fork.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, *, by_columns: bool = False) -> None:
        self._process = os.getpid()
        self._tag = b"\1" + os.urandom(31)
        on_host = device.type == "cpu"
        mapping = SPARE.take(_TAG_BYTES + (4 * rows * columns if on_host else 0))
        mapping[: len(self._tag)] = self._tag
        self._map: mmap.mmap | None = mapping
        self.matrix: Tensor
        if on_host:
            flat = torch.frombuffer(mapping, dtype=torch.int32, offset=_TAG_BYTES, count=rows * columns)
        else:
            flat = torch.empty(rows * columns, dtype=torch.int32, device=device)
        self.matrix = flat.view(columns, rows).t() if by_columns else flat.view(rows, columns)
        self._one_run = by_columns and on_host  # whether columns that adjoin stand in one run of the mapping

    @property
    def intact(self) -> bool:
        """Whether it is what this process wrote."""
        mapping = self._map
        return os.getpid() == self._process and mapping is not None and mapping[: len(self._tag)] == self._tag

    def spoil(self) -> None:
        """Make it unusable for good."""
        if (mapping := self._map) is not None:
            mapping[: len(self._tag)] = bytes(len(self._tag))

    def free(self) -> None:
        """Make it unusable, wipe it for another one, or give it back to the system once no tensor shows it any more."""
        self.spoil()
        self.matrix = self.matrix.new_empty(0)
        mapping, self._map = self._map, None
        if mapping is not None:
            SPARE.give(mapping)

    def by_columns(self) -> MaskMemory:
        """A copy with the values of each column side by side; this one is forgotten."""
        if not self.intact:
            raise SecurityError("masks of another process or a closed session cannot be used")
        rows, columns = self.matrix.shape
        copy = MaskMemory(rows, columns, self.matrix.device, by_columns=True)
        # This way round torch copies in blocks, in a tenth of the time.
        copy.matrix.t().copy_(self.matrix.t())
        if not self.intact:
            raise SecurityError("masks of another process or a closed session cannot be used")
        self.free()
        return copy

    def overwrite(self, columns: slice) -> None:
        """Put random bytes in the place of some columns, from a generator of their own.

        Those of torch belong to the user: what a training draws must not depend on when masks are forgotten.
        """
        if self._map is None or not self.intact:
            return
        rows = self.matrix.shape[0]
        try:
            noise = _own_noise(4 * rows * (columns.stop - columns.start))
        except SecurityError:
            self.spoil()
            raise
        if self._one_run:
            # Of one token, or a few side by side: copying them takes less time than saying where they are.
            first = _TAG_BYTES + 4 * rows * columns.start
            self._map[first : first + len(noise)] = noise.data
            return
        part = self.matrix[:, columns]
        part.t().copy_(torch.from_numpy(noise.view("<i4")).view(part.shape[::-1]))


_here = threading.local()


def _own_noise(nbytes: int) -> Bytes:
    """Bytes of the calling thread's stream to overwrite masks with, in this process; a multiple of four."""
    drawn: Bytes = np.empty(0, dtype=np.uint8)
    process, stream, left = getattr(_here, "noise", (0, None, drawn))
    if stream is None or process != os.getpid():
        stream = Keystream(fresh_seed())
    else:
        drawn = left
    if len(drawn) < nbytes:
        # Many at a time: one call for the bytes of a product takes longer than they do.
        size = max(nbytes, _DRAWN_BYTES)
        drawn = stream.fill(np.empty(room(size), dtype=np.uint8), size)
    _here.noise = os.getpid(), stream, drawn[nbytes:]
    return drawn[:nbytes]
