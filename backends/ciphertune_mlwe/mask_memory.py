"""Memory for masks: absent from core dumps, wiped in forks, and of no use once it was."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys

import numpy as np
import torch
from torch import Tensor

from ciphertune.errors import SecurityError
from ciphertune_mlwe.prg import Keystream, fresh_seed, room

_TAG_BYTES = 64
# Linux has these: out of core dumps, wiped in forks (which Python has no name for), and in large pages, of which fewer
# have to be mapped.
_ADVICE = (
    (getattr(mmap, "MADV_DONTDUMP", 16), 18, getattr(mmap, "MADV_HUGEPAGE", 14))
    if sys.platform.startswith("linux")
    else ()
)


class MaskMemory:
    """One matrix of int32, with a random tag in the same mapping.

    A fork finds zeros here (``MADV_WIPEONFORK``), and a mask of zeros would send the plaintext: so the tag, which is
    never zero, is compared before a mask is used, beside the process.

    Args:
        rows, columns: of the matrix.
        device: where it lives; memory of other devices is mapped in no fork.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._process = os.getpid()
        self._tag = b"\1" + os.urandom(31)
        on_host = device.type == "cpu"
        mapping = _mapping(_TAG_BYTES + (4 * rows * columns if on_host else 0))
        mapping[: len(self._tag)] = self._tag
        self._map: mmap.mmap | None = mapping
        self.matrix: Tensor
        if on_host:
            flat = torch.frombuffer(mapping, dtype=torch.int32, offset=_TAG_BYTES, count=rows * columns)
            self.matrix = flat.view(rows, columns)
        else:
            self.matrix = torch.empty(rows, columns, dtype=torch.int32, device=device)

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
        """Make it unusable and give the memory back to the system, as soon as no tensor shows it any more."""
        self.spoil()
        self.matrix = self.matrix.new_empty(0)
        self._map = None

    def overwrite(self, columns: slice) -> None:
        """Put random bytes in the place of some columns, from a generator of their own.

        Those of torch belong to the user: what a training draws must not depend on when masks are forgotten.
        """
        if not self.intact:
            return
        part = self.matrix[:, columns]
        size = 4 * part.numel()
        try:
            noise = Keystream(fresh_seed()).fill(np.empty(room(size), dtype=np.uint8), size)
        except SecurityError:
            self.spoil()
            raise
        part.copy_(torch.from_numpy(noise.view("<i4")).view(part.shape))


def _mapping(nbytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in _ADVICE:
        # Old kernels know one of them or none; the process is compared too.
        with contextlib.suppress(OSError):
            memory.madvise(advice)
    return memory
