"""Links to a session's workers, as its transport opens them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

from ciphertune.client.choice import Choice
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed, wrong_result
from ciphertune.transport import Link, LocalWorker

log = logging.getLogger(__name__)


def connect(choice: Choice, worker: LocalWorker | None) -> list[Link]:
    """Open a link to every worker. One that takes longer than the option ``connect_timeout`` is warned of.

    Raises:
        PluginError: the transport raised what it does not declare, or gave something that is no link.
        SelectionError, KeyFileError, SecurityError, TransportError: as ``Transport.connect``.
    """
    name = choice.selection.transport
    with _warning(name, choice.options.connect_timeout), blamed(registry.TRANSPORTS, name, "'connect'"):
        found: object = choice.transport.connect(choice.selection.endpoints, worker)
    if not isinstance(found, Sequence) or not all(isinstance(each, Link) for each in found):
        why = f"gave a {type(found).__name__}, and must give a sequence of ciphertune.transport.Link"
        raise wrong_result(registry.TRANSPORTS, name, "'connect'", why)
    return list(found)


@contextlib.contextmanager
def _warning(name: str, seconds: float) -> Iterator[None]:
    """Say which transport is waited for, if it takes longer than some seconds."""
    text = "%s has not opened its links after %g s, and nothing bounds how long it takes"
    timer = threading.Timer(seconds, lambda: log.warning(text, registry.title(registry.TRANSPORTS, name), seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
