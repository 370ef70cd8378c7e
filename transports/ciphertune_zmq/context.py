"""One ZeroMQ context for all of a process's links, and file descriptors enough before ZeroMQ asks for any."""

from __future__ import annotations

import contextlib
import os
import threading

import zmq

from ciphertune.errors import TransportError

IO_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Of a context: each encrypts and decrypts for some of its connections."""
# Three sockets a link.
_MOST_SOCKETS = 1 << 14
_CONTEXT_DESCRIPTORS = 3 + 2 * IO_THREADS
LOOP_DESCRIPTORS = 12
"""File descriptors that a socket takes with its monitor, what wakes it, its first connection, and some to spare."""


class _Shared:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.context: zmq.Context[zmq.Socket[bytes]] | None = None


_shared = _Shared()
# What a forked process inherits has no threads there; it is neither used nor taken down.
_inherited: list[_Shared] = []


def _forget() -> None:
    global _shared
    _inherited.append(_shared)
    _shared = _Shared()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_forget)


def shared_context() -> zmq.Context[zmq.Socket[bytes]]:
    """The context of this process's links, made at the first call and kept. Raises ``TransportError``."""
    with _shared.lock:
        if _shared.context is None:
            need_descriptors(_CONTEXT_DESCRIPTORS + LOOP_DESCRIPTORS)
            _shared.context = zmq.Context(IO_THREADS)
            _shared.context.set(zmq.MAX_SOCKETS, _MOST_SOCKETS)
        return _shared.context


def need_descriptors(count: int) -> None:
    """Raise ``TransportError`` where this process may not open so many more files: ZeroMQ would end the process."""
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(count):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            raise TransportError(
                f"too few file descriptors for another connection ({error.strerror}): close some, or raise the limit "
                "(ulimit -n)"
            ) from error
