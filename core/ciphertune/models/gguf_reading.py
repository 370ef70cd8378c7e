"""Files in GGUF form, read once by transformers and not once for each part of a model."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def read_once(gguf_file: str | None) -> Iterator[None]:
    """While it is open, transformers reads a file in GGUF form once; for None nothing changes.

    Transformers reads the file for the configuration, for the weights, and for the tokenizer, each time entry by
    entry; and it makes the table of tensor names for each submodule. Of SmolLM2 that is 25 of 35 seconds of a core.
    It imports both from ``gguf`` where it needs them, so that what is kept there for the time of loading is what it
    takes.

    Args:
        gguf_file: the file that will be read, or None for a model in another form. ``gguf`` is installed unless None.
    """
    if gguf_file is None:
        yield
        return
    import gguf

    with _one_at_a_time:
        before: dict[str, Any] = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        gguf.GGUFReader = functools.cache(_plain(gguf.GGUFReader))
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(gguf, name, value)


def _plain(reader: Any) -> Any:
    """A reader's class that slices the file as an array: slicing ``np.memmap`` takes three times as long."""

    class Plain(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    return Plain
