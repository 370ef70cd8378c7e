"""Where the hints of a session live: in memory as far as that may be, and on disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ciphertune.errors import CacheError, KeyFileError
from ciphertune_mlwe.hint_cache import HintCache, SealedFile, client_secret
from ciphertune_mlwe.params import ParameterSet
from ciphertune_mlwe.transforms import LANES

log = logging.getLogger(__name__)


class Hints(Protocol):
    """The hints of one product."""

    @property
    def nbytes(self) -> int:
        """Their size."""
        ...

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """All of them in order, as ``Transforms.hint_masks`` takes them, with the row that each part starts at.

        A part is not to be kept: its memory serves the next one.
        """
        ...


class HeldHints:
    """Hints in memory.

    Args:
        hints: all of them.
    """

    def __init__(self, hints: Tensor) -> None:
        self._hints = hints

    @property
    def nbytes(self) -> int:
        """See ``Hints.nbytes``."""
        return self._hints.nbytes

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """See ``Hints.parts``: one."""
        yield 0, self._hints


class StreamedHints:
    """Hints that are read from disk for each use, while the system already reads those that are used next.

    Args:
        hints: on disk.
        course: shared by all of a session.
    """

    def __init__(self, hints: SealedFile, course: _Course) -> None:
        self._hints = hints
        self._course = course

    @property
    def nbytes(self) -> int:
        """See ``Hints.nbytes``."""
        return self._hints.nbytes

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """See ``Hints.parts``. Raises ``CacheError`` where the file is not what was written."""
        self._course.used(self._hints)
        for pack, part in self._hints.parts():
            yield pack * LANES, part


class _Course:
    """The order in which hints are used, which is that of the time before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: SealedFile | None = None
        self._next: dict[SealedFile, SealedFile] = {}

    def used(self, hints: SealedFile) -> None:
        with self._lock:
            if self._last is not None and self._last is not hints:
                self._next[self._last] = hints
            self._last = hints
            coming = self._next.get(hints)
        if coming is not None:
            coming.expect()


class HintStore:
    """Finds the hints of products, and keeps those that are made.

    Args:
        memory: bytes of hints that are held in memory at most.
        disk: bytes of all models' hints on disk at most; 0 for none.
        device: where hints are used.
    """

    def __init__(self, memory: int, disk: int, device: torch.device) -> None:
        self._memory = memory
        self._disk = disk
        self._device = device
        self._cache: HintCache | None = None
        self._course = _Course()
        self._held = 0
        self._coming = 0
        self._writes = False

    def open(self, model: bytes) -> bytes | None:
        """Look for a model's hints on disk.

        Args:
            model: SHA-256 over the model's layers.

        Returns:
            The seed of the public matrix that hints on disk are of; None where none are kept.
        """
        if not self._disk:
            return None
        try:
            secret = client_secret()
            self._cache = HintCache(model, secret, self._disk, self._device)
        except (OSError, KeyFileError) as error:
            log.warning("hints are not kept on disk: %s", error)
            return None
        self._writes = True
        return secret.seed

    def find(self, identity: str, rows: int, parameters: ParameterSet) -> Hints | None:
        """The hints of a product, if they are on disk and are what was written."""
        if self._cache is None:
            return None
        hints = self._cache.of(identity, rows, parameters)
        if not hints.exists():
            return None
        try:
            if self._held + hints.nbytes <= self._memory:
                found = HeldHints(hints.whole())
                self._held += found.nbytes
                return found
            hints.verify()
        except CacheError as error:
            log.warning("%s", error)
            return None
        return StreamedHints(hints, self._course)

    def announce(self, nbytes: int) -> None:
        """Take notice of hints that are to be made; room for them is made at once.

        Raises:
            CacheError: they fit neither in memory nor on disk.
        """
        self._coming += nbytes
        try:
            self._writes = self._writes and self._cache is not None and self._cache.make_room(self._coming)
            why = f"the disk has no room for {_told(self._coming)}, or hint_disk={self._disk >> 20} MB is less"
        except CacheError as error:
            self._writes, why = False, str(error)
        total = self._held + self._coming
        if self._writes or total <= self._memory:
            return
        if self._cache is None:
            why = "they are not kept on disk"
        raise CacheError(
            f"the hints take {_told(total)} or more, hint_memory={self._memory >> 20} MB is less, and {why}. "
            "Raise the option that can be raised, free disk space ('ciphertune cache' shows what is kept), or "
            "outsource fewer layers"
        )

    def keep(self, identity: str, rows: int, parameters: ParameterSet, hints: Tensor) -> Hints:
        """Keep hints that were made, in memory if there is room for them, and on disk for the next session.

        Raises:
            CacheError: they fit neither in memory nor on disk.
        """
        self._coming -= hints.nbytes
        fits = self._held + hints.nbytes <= self._memory
        written = None
        if self._writes and self._cache is not None:
            written = self._cache.of(identity, rows, parameters)
            try:
                written.write(hints)
            except OSError as error:
                if not fits:
                    raise CacheError(
                        f"the hints of a product, {_told(hints.nbytes)}, cannot be written: {error.strerror}. "
                        f"{_told(self._coming)} more are to come"
                    ) from None
                log.warning("hints are not kept on disk: %s", error.strerror)
                self._writes, written = False, None
        if fits:
            self._held += hints.nbytes
            return HeldHints(hints)
        if written is None:
            raise CacheError(f"hints of {_told(hints.nbytes)} fit neither in memory nor on disk")
        return StreamedHints(written, self._course)

    def find_checks(self, identity: str, cuts: Sequence[int], nbytes: int) -> bytes | None:
        """A group's check vectors for these cuts, if they are on disk and are what was written."""
        if self._cache is None:
            return None
        file = self._cache.checks_of(identity, cuts, nbytes)
        try:
            return bytes(file.whole().cpu().numpy()) if file.exists() else None
        except CacheError as error:
            log.warning("%s", error)
            return None

    def keep_checks(self, identity: str, cuts: Sequence[int], content: bytes) -> None:
        """Keep a group's check vectors for the next session, if there is room."""
        if not self._writes or self._cache is None:
            return
        try:
            values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self._cache.checks_of(identity, cuts, len(content)).write(values)
        except OSError as error:
            log.warning("check vectors are not kept on disk: %s", error.strerror)

    def close(self) -> None:
        """Hold nothing on disk any more. Idempotent."""
        if self._cache is not None:
            self._cache.close()


def _told(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
